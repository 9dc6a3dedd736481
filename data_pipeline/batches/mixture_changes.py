"""What differs between the mixture of a checkpoint and the one that a run is resumed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two mixtures, in words; names and places of the data do not count.

    Args:
        before: The `MixtureDataset.state` of the checkpoint.
        now: That of the mixture to go on with.
    """
    old, new = ({s["content_sha256"]: s for s in state["sources"]} for state in (before, now))
    found = []
    renewed = {s["name"] for s in before["sources"]} & {new[sha]["name"] for sha in new.keys() - old.keys()}
    for sha, source in old.items():
        name = source["name"]
        if sha not in new:
            now_there = next((n["content_sha256"][:12] for n in new.values() if n["name"] == name), None)
            found.append(f"{name} had content {sha[:12]}, now {now_there}" if now_there else f"{name} is gone")
            continue
        found += [
            f"{key} of {name} was {source[key]}, now {new[sha][key]}"
            for key in ("weight", "max_epochs")
            if source[key] != new[sha][key]
        ]
    found += [f"{s['name']} is new" for sha, s in new.items() if sha not in old and s["name"] not in renewed]
    stages = []
    for state in (before, now):
        sha = {s["name"]: s["content_sha256"] for s in state["sources"]}
        stages.append([(t["position"], {sha[n]: w for n, w in t["weights"].items()}) for t in state["stages"]])
    if stages[0] != stages[1]:
        was, are = (
            ", ".join(f"{t['weights']} from sample {t['position']}" for t in state["stages"]) or "none"
            for state in (before, now)
        )
        found.append(f"stages were {was}, now {are}")
    return found


def order_id(state: Mapping[str, Any]) -> str:
    """Return a hash of what decides which sample of which content comes at a position, whatever the sources' names.

    Args:
        state: `MixtureDataset.state`.
    """
    content = {source["name"]: source["content_sha256"] for source in state["sources"]}
    decisive = {
        "start": state["start"],
        "consumed": {sha: state["consumed"].get(sha, 0) for sha in content.values()},
        "sources": sorted([s["content_sha256"], s["weight"], s["max_epochs"]] for s in state["sources"]),
        "stages": [[t["position"], {content[n]: w for n, w in t["weights"].items()}] for t in state["stages"]],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
