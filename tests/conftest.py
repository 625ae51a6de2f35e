"""What every test runs under: strict promotion, and eight devices on one machine."""

import gc
import os

# Before jax starts its backend. Eight devices are for shard_map.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Before numpy loads it. Its threads wait in a loop that takes a core from other processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before it takes a GPU's memory: other processes of a test need some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from jax.experimental.custom_partitioning import custom_partitioning

from tests.support import compiling


def _one_core_each():
  """Gives a process of pytest-xdist a core of its own, where there are as many as cores.

  XLA compiles on threads, and those of several processes on the same cores take a quarter longer.
  """
  worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...
  if not worker or not hasattr(os, "sched_setaffinity"):
    return
  cores = sorted(os.sched_getaffinity(0))
  if int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) >= len(cores):
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


_one_core_each()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# JAX checks its own work with 0.11 and newer only: with 0.10 that is a tenth of the time.
jax.config.update("jax_enable_checks", jax.__version_info__ >= (0, 11))
# Programs do not say from which lines of Python each operation is. XLA copies that again and again.
jax.config.update("jax_traceback_in_locations_limit", 0)
# Without a folder it keeps nothing, but makes the key of each program.
jax.config.update("jax_enable_compilation_cache", False)
compiling.optimize(False)  # what modules of tests compute when they are imported
# Tracing makes many objects that live: by default a tenth of all time is a search for garbage.
gc.set_threshold(50_000, 10, 10)


@pytest.fixture(autouse=True)
def _optimized_where_marked(request):
  """Programs are compiled as for users in modules about numbers, marked `optimized`, and on a GPU.

  Elsewhere XLA has the same passes, but emits code quickly; not so if JAXQQ_OPTIMIZED=1.
  """
  optimized = bool(os.environ.get("JAXQQ_OPTIMIZED"))
  optimized |= any(request.node.get_closest_marker(mark) for mark in ("optimized", "gpu"))
  optimized &= "quick_compiles" not in request.fixturenames
  quickly = not request.node.get_closest_marker("newer_emitters")
  if (optimized and not compiling.optimizes()) or (compiling.emits_quickly() and not quickly):
    jax.clear_caches()
  compiling.optimize(optimized)
  compiling.emit_quickly(quickly)


MOST_MEMORY = 2 << 30  # bytes, of a process


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
  """Hundreds of small programs, for eight devices, add up to gigabytes.

  Forgetting them takes time, and so does making again what modules share.
  """
  yield
  if _memory() > MOST_MEMORY:
    jax.clear_caches()


def _memory():
  """Bytes that this process holds; infinite where that is not known."""
  try:
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except OSError:
    return float("inf")


@pytest.fixture
def quick_compiles():
  """For tables of many programs, each run once and compared with the same one unsplit.

  XLA emits code quickly, and JAX does not check its own work.
  """
  compiling.optimize(False)
  with jax.enable_checks(False):
    yield


@pytest.fixture
def partition_rules(monkeypatch):
  """The callbacks of each rule that a traced program gives to XLA's partitioner."""
  rules = []
  def_partition = custom_partitioning.def_partition

  def recorded(self, **callbacks):
    rules.append(callbacks)
    def_partition(self, **callbacks)

  monkeypatch.setattr(custom_partitioning, "def_partition", recorded)
  return rules


# For tests of kernels, in Mosaic GPU's interpreter.


@pytest.fixture
def no_races(capfd):
  """The interpreter's race detector knows what each barrier orders, and prints what none does."""
  yield
  assert "RACE DETECTED" not in "".join(capfd.readouterr())
