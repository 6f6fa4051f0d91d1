"""torch.compile compiles the layers of a chain, and leaves the code between them, ours, alone.

Traced, that code would have to be kept to what the compiler knows. What torch.export traces in its
strict mode, forward passes up to their first step, stays open to it.
"""

from pathlib import Path

from torch._dynamo import trace_rules

OPEN = {"chain", "has_method", "rnn.layers", "trunks.converted"}

_folder = Path(__file__).parent
for _file in _folder.rglob("*.py"):
    _module = ".".join(_file.relative_to(_folder).with_suffix("").parts)
    if _file.stem != "__init__" and _module not in OPEN:
        trace_rules.add(f"highway_bp.{_module}")
