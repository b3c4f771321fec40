"""Makes tests/mergekit_numbers.json: what mergekit 0.1.5 merges of small matrices, its random numbers given.

python -m venv oracle; oracle/bin/pip install mergekit==0.1.5; oracle/bin/python tests/mergekit_numbers.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mergekit.merge_methods.base import TensorGroup  # pyright: ignore[reportMissingImports] # it is no dependency
from mergekit.merge_methods.registry import registered_methods  # pyright: ignore[reportMissingImports] # the same
from torch import Tensor

ROWS, COLUMNS, WEIGHTS = 5, 8, (0.75, 1.5, 0.5)
CASES: dict[str, dict[str, float]] = {
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.2},
    "della_linear": {"density": 0.6, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
}


def merged(name: str, case: dict[str, float], changes: list[Tensor], numbers: list[Tensor]) -> Tensor:
    """With mergekit's own defaults of normalize and rescale."""
    method = next(m for m in registered_methods() if getattr(m, "method_name", "") == name)
    left: Iterator[Tensor] = iter(numbers)
    shared: dict[str, Any] = {
        "normalize": method.default_normalize,
        "rescale": method.default_rescale,
        "lambda": 1.0,
        "int8_mask": False,
    }
    own = {key: dict.fromkeys(range(1, 1 + len(changes)), value) for key, value in case.items()}
    own["weight"] = {k + 1: w for k, w in enumerate(WEIGHTS)}
    group = TensorGroup.from_tensors([torch.zeros_like(changes[0]), *changes], base_index=0)
    with patch("torch.bernoulli", lambda chance: (next(left) < chance).to(chance.dtype)):
        return method.merge_group(group, **shared, **own)


def main() -> None:
    generator = torch.Generator().manual_seed(6)
    order = torch.stack([torch.randperm(ROWS * COLUMNS, generator=generator) + 1 for _ in WEIGHTS])
    signs = torch.randint(0, 2, order.shape, generator=generator) * 2 - 1
    changes = list((order * signs / 16).view(-1, ROWS, COLUMNS))  # no two of one magnitude: its order of them is open
    numbers = [torch.rand(ROWS, COLUMNS, generator=generator) for _ in WEIGHTS]
    made = {name: merged(name, case, changes, numbers).tolist() for name, case in CASES.items()}
    rows = {"weights": WEIGHTS, "changes": [c.tolist() for c in changes], "numbers": [n.tolist() for n in numbers]}
    text = json.dumps({**rows, "cases": CASES, "made": made})
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
