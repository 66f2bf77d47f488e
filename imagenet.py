"""Prune a convolutional network and train it: options, data, network, method, train, finish, export, report.

python imagenet.py --arch mobilenet_v2 --data_set imagefolder --data_path ImageNet --pretrained_model v2.pt \\
    --method block_l1 --N 4 --pr_target 0.5 --rearrange --job_dir experiments/v2_1x4
"""

import sys
from typing import TYPE_CHECKING

from utils import errors

if TYPE_CHECKING:
    from utils.options import Options

START = """Prune a convolutional network and train it. To start:

  python imagenet.py --arch resnet20 --num_epochs 3 --lr 0.1 --job_dir experiments/first
      prunes and trains on handwritten digits, which are embedded
  python imagenet.py --config configs/1xn/resnet50_1x4.yml --data_path ImageNet --pretrained_model resnet50.pt
      runs a recipe of the published tables
  python imagenet.py --list
      shows networks, data sets and methods
  python imagenet.py --help
      shows the options; with --method NAME also those of the method"""


def main(argv: list[str]) -> None:
    if not argv:  # nothing was asked, and nothing is done: the status tells a script that expected a training
        print(START, file=sys.stderr)
        raise SystemExit(2)
    options = parse(argv)

    # What needs torch is imported here, since that takes two seconds: --help, --list and a mistyped flag are answered
    # before. The rest is imported late, too, so that Ctrl-C is answered in one line from the start.
    with errors.uninterrupted():
        import torch

        import models
        from jobs import checkpoint, folder, pictures, prune
        from jobs.evaluate import evaluate
        from jobs.parts import Parts, create_network
        from utils import machine, ranks, report

    options = checkpoint.complete(options)
    method = prune.create_method(options)
    method.check(create_network(options))
    if len(options.gpus) > 1 and torch.cuda.is_available() and not ranks.started():
        ranks.start(__file__, argv, options.gpus)
    with ranks.join() as here, folder.kept_by(options, here):
        screen = report.screen(quiet=not here.first)
        device, line = machine.pick_device(here.local if here.world > 1 else options.gpus[0])
        screen.print(line if here.world == 1 else f"{line}; {here.world} processes")
        if options.check_data:
            return pictures.check(options, device, screen)
        torch.manual_seed(options.seed)
        train, val = pictures.create_loaders(options, device, here, screen)
        network = models.create_model(options.arch, len(train.classes), options.seed, **options.arguments())
        network.to(device, memory_format=torch.channels_last)
        parts = Parts(options, method, network, train, val, here, screen)
        if options.evaluate:
            return evaluate(parts)
        run = prune.start(parts, argv)
        prune.train(parts, run)
        prune.hand_over(parts, run)


def parse(argv: list[str]) -> "Options":
    """The options of a run, those of its method included. Raises ValueError for what is wrong with them."""
    import data
    import models
    import pruning.options
    import utils.parse

    answers = {"--list": (listing, "show networks, data sets and methods, and exit")}
    options = utils.parse.parse(argv, pruning.options, __doc__, answers)
    models.known(options.arch)
    data.known(options.data_set)
    return options


def listing() -> str:
    """What there is to choose from, a line each."""
    import data
    import models
    import pruning.options

    also = {name: f" (also {alias})" for alias, name in pruning.ALIASES.items()}
    sections = {
        "networks (--arch)": {name: network.about for name, network in models.NETWORKS.items()} | models.FOREIGN,
        "data sets (--data_set)": {name: data_set.about for name, data_set in data.DATA_SETS.items()},
        "methods (--method)": {name: row.about + also.get(name, "") for name, row in pruning.METHODS.items()},
    }
    lines = []
    for title, rows in sections.items():
        lines += ["", f"{title}:", *(f"  {name:20} {about}" for name, about in rows.items())]
    return "\n".join(lines[1:])


if __name__ == "__main__":
    sys.exit(errors.answer("imagenet.py", lambda: main(sys.argv[1:])))
