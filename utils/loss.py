"""What is minimised."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loss:
    """Cross-entropy, with a share of it replaced by imitation of a teacher.

    Args:
        label_smoothing: share of the target spread over all classes.
        teacher: a network to imitate (Hinton et al. 2015: Kullback-Leibler divergence of softened outputs, times T^2).
        share: of the imitation in the loss.
        temperature: T, by which both networks' logits are divided.
    """

    def __init__(self, label_smoothing=0.0, teacher: nn.Module | None = None, share=0.0, temperature=4.0):
        self.label_smoothing, self.teacher, self.share, self.temperature = label_smoothing, teacher, share, temperature

    def __call__(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.inference_mode():
            wanted = (self.teacher(images).float() / self.temperature).log_softmax(1)
        wanted = wanted.clone()  # autograd does not take tensors of inference mode
        ours = (logits / self.temperature).log_softmax(1)
        imitation = F.kl_div(ours, wanted, reduction="batchmean", log_target=True)
        return (1 - self.share) * loss + self.share * self.temperature**2 * imitation
