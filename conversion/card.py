"""What people read of a conversion: the plan before it, the model card behind it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from rich.markup import escape
from rich.table import Table

from st_moe.configuration.configuration_st_moe import installed_version
from st_moe.conversion.streaming import Plan

if TYPE_CHECKING:
    # Model classes would take more memory than the conversion itself.
    from st_moe.conversion.proof import IdentityProof

# What Python, torch and the host's model classes take beside the weights, in bytes; measured by
# `python -m benchmarks.conversion`.
_BASE_MEMORY = 300 * 10**6

_ON_CODE = """
Without the package, the code in this folder does it: leave `import st_moe` out and add `trust_remote_code=True`.
"""


def plan_table(plan: Plan, destination: Path) -> Table:
    """The plan for people: what would be made of what, and what it takes."""
    facts = plan.facts
    place = next(path for path in (destination.absolute(), *destination.absolute().parents) if path.exists())
    table = Table("", "plan", title="Nothing is written", show_header=False)
    rows = {
        "source": ", ".join(plan.sources),
        "dense family": facts["family"],
        "recipe": plan.recipe,
        "sparse layers": f"{facts['sparse_layers']} of {facts['layers']}",
        "experts per sparse layer": f"{facts['experts']}, of which {facts['choices']} per token",
        "parameters": f"{facts['total']:,}, of which {facts['active']:,} active per token",
        "bytes to write": f"{plan.num_bytes:,} in {len(plan.shards)} files",
        "peak memory of a process, about": f"{_BASE_MEMORY + plan.largest_bytes:,} bytes",
        "free disk": f"{shutil.disk_usage(place).free:,} bytes",
    }
    if plan.computed:
        rows["bytes on the way"] = f"{sum(plan.computed):,}, of tensors that the source's files hold otherwise"
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    return table


def model_card(
    sources: Sequence[str | Path],
    plan: Plan,
    seed: int,
    proof: IdentityProof | None,
    non_finite: Mapping[str, int],
    with_code: bool = False,
) -> str:
    """Model card in the Hub's format.

    Args:
        sources: the dense models, as the caller named them.
        plan, seed: of the conversion.
        proof: of step-0 identity, if it was measured.
        non_finite: how many values of which of the source's tensors are NaN or infinite.
        with_code: whether the folder holds the code that the mixture runs on.
    """
    facts = plan.facts
    local = [Path(source).exists() for source in sources]
    names = [Path(source).resolve().name if here else str(source) for source, here in zip(sources, local, strict=True)]
    parent = ", ".join(names)
    # The Hub knows no folder of this machine, so only names of its own are linked.
    link = "" if any(local) else f"base_model: [{parent}]\n"
    options = "".join(f", {name}={value}" for name, value in plan.options.items())
    faults = f"\n| NaN or infinite weights of the source | {faults_of(non_finite)} |" if non_finite else ""
    return f"""---
library_name: transformers
tags: [st_moe, mixture-of-experts, upcycled]
{link}---

# Mixture of experts, upcycled from {parent}

| | |
|---|---|
| dense family | {facts["family"]} |
| experts per sparse layer | {facts["experts"]}, of which {facts["choices"]} per token |
| sparse layers | {facts["sparse_layers"]} of {facts["layers"]} |
| parameters | {facts["total"]:,}, of which {facts["active"]:,} active per token |
| recipe | `{plan.recipe}`, seed {seed}{options} |
| proof | {proof or "not measured"} |{faults}
| made with | st_moe {installed_version()}, transformers {transformers.__version__}, torch {torch.__version__} |

```python
import st_moe
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
{_ON_CODE if with_code else ""}"""


def faults_of(non_finite: Mapping[str, int], most: int = 5) -> str:
    """How many values of which tensors are NaN or infinite."""
    names = sorted(non_finite)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{sum(non_finite.values())} values in {len(names)} tensors: {', '.join(names[:most])}{more}"
