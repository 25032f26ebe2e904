"""Random nets, inputs and options for trials.py: what each seed stands for."""

import contextlib
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rat_ext import reference
from rat_ext.search.checked import WIDE

KINDS = {
    "plain": "inputs that fill their bounds, in float32 or float64",
    "wide": "bounds far wider than the inputs or far from 0, or eps_max tiny against the bounds",
    "half": "bfloat16 and float16",
    "extreme": "bounds near the largest and the smallest numbers of float32",
}
MOST_CALLS = 5000
BOUNDS = {
    "plain": [(0, 1), (0, 1), (-1, 1), (0, 255), (-3, 5)],
    "wide": [(-1e5, 1e5), (0, 1e4), (-1000, 1), (100, 101), (0, 1)],
    "half": [(0, 1), (-1, 1), (0, 255)],
    "extreme": [(-3e38, 3e38), (-1e30, 1e30), (0, 3e38), (0, 1e-30), (-1e-38, 1e-38)],
}


class Net(nn.Module):
    """A random classifier that can note what it was run on."""

    def __init__(self, dice: random.Random, shape: tuple[int, ...], low: float, width: float):
        super().__init__()
        self.low, self.width = low, width
        self.scale = 10 ** dice.uniform(-4, 2)
        self.wrapped = dice.random() < 0.1
        classes = dice.choices([2, 3, 10, 100, 1000, 21841], [20, 20, 40, 13, 6, 1])[0]
        act = dice.choice([nn.ReLU, nn.GELU, nn.Tanh])
        layers: list[nn.Module] = []
        if len(shape) == 3 and dice.random() < 0.7:
            channels = dice.choice([4, 8])
            layers += [nn.Conv2d(shape[0], channels, 3, padding=1), nn.BatchNorm2d(channels), act()]
            layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
            features = 4 * channels
        else:
            layers, features = [nn.Flatten()], math.prod(shape)
        for _ in range(dice.choice([0, 1, 1, 2, 8])):
            hidden = dice.choice([8, 16, 32])
            layers.append(nn.Linear(features, hidden))
            layers += [nn.BatchNorm1d(hidden)] if dice.random() < 0.3 else []
            layers += [act()] + ([nn.Dropout(0.3)] if dice.random() < 0.2 else [])
            features = hidden
        layers.append(nn.Linear(features, classes))
        self.body = nn.Sequential(*layers)
        self.log: list[Tensor] | None = None
        self.calls_left = math.inf
        gain = dice.uniform(1, 4)
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                if "running" in name:
                    tensor.copy_(torch.rand_like(tensor) + 0.1)
                elif tensor.ndim > 1:
                    tensor *= gain

    @contextlib.contextmanager
    def stopping(self):
        """An error, not a hang, where a search does not end."""
        self.calls_left = MOST_CALLS
        yield
        self.calls_left = math.inf

    def forward(self, x: Tensor):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise RuntimeError(f"the search did not end in {MOST_CALLS} forwards")
        if self.log is not None:
            self.log.append(x.detach().clone())
        x = x.to(self.body[-1].weight.dtype)
        logits = self.body(x * (2 / self.width) - (2 * self.low / self.width + 1)) * self.scale
        return SimpleNamespace(logits=logits) if self.wrapped else logits


def margin_step(model, x, y):
    """A user's attack: a step up the gradient of the nearest other class."""
    leaf = x.clone().requires_grad_()
    z = reference.logits_of(model(leaf), len(x))
    gap = z.scatter(1, y[:, None], -math.inf).amax(1) - z.gather(1, y[:, None])[:, 0]
    return x + reference.steepest(torch.autograd.grad(gap.sum(), leaf)[0], "l2")


def waves(_, x, __):
    """A user's attack that looks at no model: its rays cross where they like."""
    return x + torch.sin(
        (37 * x).nan_to_num(0, 0, 0) + torch.arange(x[0].numel()).view(x.shape[1:])
    )


def stays(_, x, __):
    """A user's attack that finds nothing."""
    return x.clone()


RAYS = {"linf": ["fgsm", margin_step, waves], "l2": ["fgsm_l2", margin_step, waves]}


def attacks_of(options: dict) -> list:
    attack = options["attack"]
    return attack if isinstance(attack, list) else [attack]


@dataclass
class Case:
    """One net, its inputs, and the options to try on them."""

    seed: int
    kind: str

    def __post_init__(self) -> None:
        dice = random.Random(f"{self.kind} {self.seed}")
        torch.manual_seed(self.seed)
        low, high = dice.choice(BOUNDS[self.kind])
        # Where the inputs are, and on what scale the model looks at them.
        centred = self.kind == "wide" and high - low > 1
        at, width = (0, 1) if centred else (low, high - low)
        shapes = [(1,), (5,), (12,), (40,), (3, 4), (2, 3, 3), (3, 6, 6), (1, 8, 8)]
        shape, rows = dice.choice(shapes), dice.randint(1, 8)
        plain_types = [torch.float32, torch.float32, torch.float64]
        types = [torch.bfloat16, torch.float16] if self.kind == "half" else plain_types
        self.dtype = dice.choice(types)
        # A wide model on half-precision inputs shows what the coarse inputs alone do.
        own = dice.choice([self.dtype, torch.float32]) if self.kind == "half" else self.dtype
        self.net = Net(dice, shape, at, width).to(own)
        self.net.train(dice.random() < 0.5)
        x = at + width * torch.rand(rows, *shape, dtype=torch.float64)
        if dice.random() < 0.3:  # some elements at the bounds, exactly
            x = x.where(torch.rand(x.shape) < 0.8, low if dice.random() < 0.5 else high)
        if x.ndim == 4 and dice.random() < 0.3:
            x = x.to(memory_format=torch.channels_last)
        self.x = x.clamp(low, high).to(self.dtype)
        if dice.random() < 0.03:
            self.x[0] = math.nan
        for parameter in self.net.parameters():
            if dice.random() < 0.3:
                parameter.grad = torch.ones_like(parameter)
        self.options = self.random_options(dice, low, high)

    def random_options(self, dice: random.Random, low: float, high: float) -> dict:
        o: dict = {"bounds": (low, high)}

        def maybe(name, chance, value):
            if dice.random() < chance:
                o[name] = value

        wide = torch.finfo(WIDE[self.dtype])
        norm = dice.choice(["linf", "linf", "l2"])
        suffix = "" if norm == "linf" else "_l2"
        attack = dice.choices(["ray", "user", "stays", "pgd", "several"], [55, 15, 2, 14, 14], k=1)[
            0
        ]
        if attack == "ray":
            o["attack"] = "fgsm" + suffix
        elif attack == "pgd":
            o["attack"] = "pgd" + suffix
        elif attack == "several":
            o["attack"] = dice.sample([*RAYS[norm], "pgd" + suffix], dice.randint(2, 3))
        else:
            o["attack"] = stays if attack == "stays" else dice.choice(RAYS[norm][1:])
        named = [a for a in attacks_of(o) if isinstance(a, str)]
        if len(named) < len(attacks_of(o)):
            o["norm"] = norm
        maybe("target", 0.2 if named else 0, "runner-up")
        one_probe = any("pgd" in name for name in named)
        maybe("steps", 0.5 if one_probe else 0, dice.randint(1, 6))
        maybe("probes", 0 if one_probe else 0.4, dice.randint(1, 8))
        maybe("rtol", 0.6, max(dice.choice([0.5, 0.1, 1e-3, 2**-12, 1e-8]), 64.1 * wide.eps))
        maybe("temperature", 0.4, 10 ** dice.uniform(-2, 2))
        maybe("batch_size", 0.3, max(dice.randint(1, 9), o.get("probes", 1)))
        maybe("search", 0.2, "bisect")
        maybe("h", 0.2, (high - low) * 10 ** dice.uniform(-4, -1))
        reach = (-12, -6) if self.kind == "wide" else (-4, 0.3)
        maybe("eps_max", 0.3, (high - low) * 10 ** dice.uniform(*reach))
        if o["attack"] == "fgsm" and dice.random() < 0.3:
            o["method"] = "fast"
        return o

    def __str__(self) -> str:
        shown = {k: getattr(v, "__name__", v) for k, v in self.options.items()}
        shown["attack"] = [getattr(a, "__name__", a) for a in attacks_of(self.options)]
        body = " ".join(type(layer).__name__ for layer in self.net.body)
        classes, scale = self.net.body[-1].out_features, self.net.scale
        return (
            f"--only {self.seed} --kinds {self.kind}: {self.dtype} x {tuple(self.x.shape)}, "
            f"{classes} classes, logits times {scale:.2g}, {body}; {shown}"
        )
