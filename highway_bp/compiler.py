"""Let torch.compile compile the layers of a chain, but skip this library's code between them.

Traced code could use only what the compiler supports. The modules in OPEN are traced all the same:
torch.export in its strict mode traces forward passes up to their first step.
"""

from pathlib import Path

from torch._dynamo import trace_rules

OPEN = {"chain", "has_method", "rnn.layers", "trunks.converted"}

_folder = Path(__file__).parent
for _file in _folder.rglob("*.py"):
    _module = ".".join(_file.relative_to(_folder).with_suffix("").parts)
    if _file.stem != "__init__" and _module not in OPEN:
        trace_rules.add(f"highway_bp.{_module}")
