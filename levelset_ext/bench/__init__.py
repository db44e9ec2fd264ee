"""``levelset-ext bench``: every claim about speed as a command, see ``docs/performance.md``."""

from levelset_ext.bench.command import add_bench_command

__all__ = ["add_bench_command"]
