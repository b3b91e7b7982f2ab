"""The table of rights in docs/security.md: the rights that are given, no others, and the code that needs each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from esvit_core.storage.roles import ROLES

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
SECURITY = ROOT / "docs" / "security.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose head begins with a word."""
    table = SECURITY.read_text(encoding="utf-8").partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def given(objects: list[Object]) -> set[tuple[str, str]]:
    """Verb and resource of every right, as the table writes them."""
    found = set()
    for role in (thing for thing in objects if thing["kind"] == "Role"):
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    full = f"`{resource}.{group}`" if group else f"`{resource}`"
                    names = "".join(f" `{name}`" for name in rule.get("resourceNames", []))
                    found |= {(f"`{verb}`", full + names) for verb in rule["verbs"]}
    return found


def test_the_table_has_every_right_once(rendered: dict[str, list[Object]]) -> None:
    table = [(verb, resource) for verb, resource, *_ in rows("verb")]
    assert len(table) == len(set(table))
    in_no_overlay = yaml.safe_load_all((ROOT / "manifests/components/trainer/launcher-role.yaml").read_text())
    assert set(table) == given([*in_no_overlay, *(thing for objects in rendered.values() for thing in objects)])


def test_the_named_call_needs_the_right() -> None:
    ours = 0
    for verb, resource, _, asked_by in rows("verb"):
        if not (place := re.fullmatch(r"\[\S+\]\(\.\./(\S+)\) `(.+)`", asked_by)):
            assert re.match(r"(KFP|Argo Workflows) [\d.]+, `\S+\.go`$", asked_by), (verb, resource)
            continue
        file, call = place.groups()
        assert (ROOT / file).read_text(encoding="utf-8").count(call) == 1, f"{verb} {resource}: {call} in {file}"
        prefixes = {"get": ("get_", "read_")}.get(verb.strip("`"), (verb.strip("`") + "_",))
        assert call.startswith(prefixes), f"{verb} {resource}: {call} needs another right"
        ours += 1
    assert ours


def test_every_call_of_the_kubernetes_api_is_in_the_table() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "esvit_core").rglob("*.py"))
    calls = set(re.findall(r"\.((?:create|get|delete|patch|list|read|replace)_(?:namespaced|cluster)_\w+\()", code))
    assert calls == {row[3].rpartition(") ")[2].strip("`") for row in rows("verb") if "](" in row[3]}


def test_only_the_account_of_the_steps_mounts_its_token(rendered: dict[str, list[Object]]) -> None:
    """KFP's and Argo's containers in a step's pod end without it; the other accounts have no use for one."""
    table = {name.strip("`"): token.split(":")[0] for name, _, token, _ in rows("account | of")}
    assert table == {"esvit-pipeline": "yes", "esvit-trainer": "no", "esvit-maintenance": "no"}
    for objects in rendered.values():
        accounts = {t["metadata"]["name"]: t for t in objects if t["kind"] == "ServiceAccount"}
        mounts = {name: "yes" if t["automountServiceAccountToken"] else "no" for name, t in accounts.items()}
        assert mounts == table


def test_the_keys_of_the_store_are_those_of_the_code() -> None:
    table = {
        name.strip("`"): (re.findall(r"`([^`]+)`", writes), "deletes" in writes) for name, _, writes in rows("key")
    }
    assert table.pop("admin") == ([], False)
    assert table == {name: ([*role.writes, *role.deletes], bool(role.deletes)) for name, role in ROLES.items()}
