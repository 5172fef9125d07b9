"""The system calls that a job may make, in groups and with the reason of each, and what the known others answer.

What the table does not name answers ENOSYS; calls of another architecture end the process.
"""

from __future__ import annotations

import argparse
import errno
from typing import TYPE_CHECKING, Any

from sandrun.cli.terminal import print_json

if TYPE_CHECKING:
    from sandrun.linux.seccomp import Comparison
    from sandrun.sandbox.policy import Rule

EXAMPLES = """examples:
  sandrun policy                   what a job may do
  sandrun policy --init            what our process 1 beside it may do
  sandrun policy --json | jq .count"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one object: count, groups, digest, rows")
    parser.add_argument("--init", action="store_true", help="the policy of process 1 in the sandbox instead")


def run(args: argparse.Namespace) -> int:
    from sandrun.sandbox.policy import init_policy, job_policy

    policy = init_policy() if args.init else job_policy()
    groups: dict[str, list[Rule]] = {}
    for rule in policy.rows:
        groups.setdefault(rule.group, []).append(rule)
    allowed = set(policy.allowed)
    counts: dict[str, int] = {}
    counted: set[str] = set()
    for group, rules in groups.items():
        new = {rule.name for rule in rules if rule.name in allowed} - counted
        counted |= new
        counts[group] = len(new)
    if args.json:
        print_json(
            {
                "count": policy.count,
                "groups": {group: count for group, count in counts.items() if count},
                "digest": policy.digest,
                "bytes": len(policy.compile()),
                "rows": [_fields(rule) for rule in policy.rows],
            }
        )
        return 0
    width = max(len(rule.name) for rule in policy.rows)
    for group, rules in groups.items():
        print(f"{group}: {counts[group]} calls" if counts[group] else f"{group}:")
        for rule in rules:
            when = " and ".join(map(describe, rule.conditions))
            print(f"  {rule.name:{width}}  {_answer(rule):7}  {f'if {when}: ' if when else ''}{rule.why}")
        print()
    total = " + ".join(f"{count} {group}" for group, count in counts.items() if count)
    print(f"{policy.count} system calls are allowed ({total}); filter of {len(policy.compile()) // 8} instructions,")
    print(f"SHA-256 {policy.digest}")
    return 0


def describe(condition: Comparison) -> str:
    """A condition as one reads it in C."""
    name = f"arg{condition.argument}"
    sign = "==" if condition.equal else "!="
    if condition.mask == 0xFFFFFFFF:
        return f"{name} {sign} {_number(condition.value)}"
    return f"{name} & {condition.mask:#x} {sign} {_number(condition.value)}"


def _number(value: int) -> str:
    return str(value) if value < 1024 else f"{value:#x}"


def _answer(rule: Rule) -> str:
    return errno.errorcode[rule.errno] if rule.errno else "allowed"


def _fields(rule: Rule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "group": rule.group,
        "answer": _answer(rule),
        "if": [describe(condition) for condition in rule.conditions],
        "why": rule.why,
    }
