"""From Relax to machine code, with the weights apart from it.

Relax writes constants into the library, from where they are read into a second copy: a ResNet-50 (98 MB) took 400 ms
to load and 390 MB at its peak. As parameters of `main` they can be mapped from a file instead, and are there once.
"""

from collections.abc import Callable
from hashlib import sha256

import tvm
from tvm import relax

from .dump import forget
from .library import Built


@relax.expr_functor.mutator
class _Lift(relax.PyExprMutator):
    """Replaces tensors by parameters: equal ones by the same."""

    def __init__(self, module):
        super().__init__(module)
        self.parameters: dict[tuple, relax.Var] = {}
        self.tensors: list[tvm.runtime.Tensor] = []

    def visit_generic_const_(self, op):
        if not isinstance(op.value, tvm.runtime.Tensor):
            return op
        array = op.value.numpy()
        key = (array.dtype, sha256(array).digest())
        if key not in self.parameters:
            self.parameters[key] = relax.Var(f"weight_{len(self.tensors)}", op.ty)
            self.tensors.append(op.value)
        return self.parameters[key]


def build(module: tvm.IRModule, target, lowering: tvm.transform.Pass, dump: Callable = forget) -> Built:
    """Lower and compile `module`; `dump(name, module)` sees it before and after lowering."""
    weights = []

    @tvm.transform.module_pass(opt_level=0, name="LiftWeights")
    def lift(module, _):  # after all lowering: Relax would check every parameter's shape at every call
        main, lifted = module["main"], _Lift(module)
        body = lifted.visit_expr(main.body)
        weights.extend(lifted.tensors)
        parameters = [*main.params, *lifted.parameters.values()]
        whole = relax.Function(parameters, body, main.ret_ty, main.is_pure, main.attrs)
        module.update_func(module.get_global_var("main"), whole)
        dump("lowering", module)
        return module

    dump("kernels", module)
    pipeline = tvm.transform.Sequential([lowering, lift])
    return Built(generate(module, target, relax_pipeline=pipeline), weights)


def generate(module: tvm.IRModule, target, **options):
    """TVM's executable of a program, or of kernels alone."""
    # Sums that share one buffer with those of another loop are not promoted to registers.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        return tvm.compile(module, target=target, **options)
