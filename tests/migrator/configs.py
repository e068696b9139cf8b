"""Changes to the config.json of a checkpoint."""

from __future__ import annotations

import json


def config_with(**entries):
    def damage(hub):
        content = json.loads((hub / "config.json").read_text())
        (hub / "config.json").write_text(json.dumps(content | entries))

    damage.__name__ = f"config_with_{'_'.join(entries)}"
    return damage
