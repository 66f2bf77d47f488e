"""ONNX out, checked against the network that it came from."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.files import atomic

TOLERANCE = 1e-4  # of the largest output


def export_onnx(network: nn.Module, images: Tensor, path: str | Path, pictures: dict | None = None) -> float:
    """Write `network` (plain layers, eval mode) to `path` with a free batch size, and `images` beside it.

    Args:
        images: float32 (B, 3, H, W): pictures to check with; saved as `inputs.npy` for whoever compiles the file.
        pictures: what evaluation does to a picture, and the names of the classes; written into the file's metadata as
            JSON under "pictures".

    Returns:
        The largest relative difference between ONNX Runtime's outputs and the network's.

    Raises:
        ValueError: the outputs differ by more than `TOLERANCE`; nothing is written.
    """
    import onnxruntime

    # In channels_last, the exporter writes the global average pooling as a dozen operators.
    network = network.cpu().to(memory_format=torch.contiguous_format).eval()
    images = images.cpu().contiguous()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        draft = Path(folder) / "model.onnx"
        torch.onnx.export(
            network,
            (images[:2],),
            draft,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
        session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
        outputs = session.run(None, {"images": images.numpy()})[0]
        expected = network(images).numpy()
        error = float(np.abs(outputs - expected).max() / (np.abs(expected).max() or 1))  # 0/0 for one that is all zero
        if not error <= TOLERANCE:
            raise ValueError(f"{path}: ONNX Runtime differs from the network by {error:.1e}; not written")
        content = _labelled(draft, pictures) if pictures else draft.read_bytes()
    with atomic(Path(path)) as file:
        file.write(content)
    with atomic(Path(path).parent / "inputs.npy") as file:
        np.save(file, images.numpy())
    return error


def _labelled(path: Path, pictures: dict) -> bytes:
    """The ONNX file with what is known of its pictures in its metadata."""
    import onnx

    model = onnx.load(path)
    model.metadata_props.add(key="pictures", value=json.dumps(pictures))
    return model.SerializeToString()
