"""Steps of a conversion in processes of their own: what they return, what they leave in memory, what ends them."""

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from st_moe.conversion import giving_back, processes, upcycle_checkpoint
from st_moe.conversion.giving_back import GivingBack
from tests.conversion.conftest import contents

#: A process in which no model classes are imported, as that of `st-moe upcycle` is.
LIGHT = """
import sys
from st_moe.conversion.folder import upcycle_checkpoint
upcycle_checkpoint(sys.argv[1], sys.argv[2], num_experts=3, recipe="noise", max_shard_size="60KB")
assert "transformers.modeling_utils" not in sys.modules
"""


@pytest.fixture(scope="module")
def straight(stock: Path) -> dict[str, bytes]:
    """What a conversion in one process makes of it."""
    target = stock.with_name("straight")
    upcycle_checkpoint(stock, target, num_experts=3, recipe="noise", max_shard_size="60KB")
    return contents(target)


def light(stock: Path, target: Path) -> list[str]:
    return [sys.executable, "-c", LIGHT, str(stock), str(target)]


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return not status.exists() or "State:\tZ" in status.read_text("utf-8")


def test_a_second_run_for_one_destination_is_refused(
    stock: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_PATIENCE", 0.1)
    fields = {"num_experts": 3, "recipe": "noise", "max_shard_size": "60KB"}
    with processes.only_run(tmp_path / "moe"):
        with pytest.raises(ValueError, match=r"destination: another run is at work on .*moe; wait for it"):
            upcycle_checkpoint(stock, tmp_path / "moe", **fields)  # type: ignore[arg-type]
        upcycle_checkpoint(stock, tmp_path / "other", **fields)  # type: ignore[arg-type]
    upcycle_checkpoint(stock, tmp_path / "moe", **fields)  # type: ignore[arg-type]
    assert contents(tmp_path / "moe") == contents(tmp_path / "other") == straight


def in_a_child(function: Callable[..., Any], *arguments: Any) -> Any:
    def steps() -> Iterator[Any]:
        yield function(*arguments)

    with processes.Child(steps) as child:
        return next(child)


def _kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
class TestChild:
    def test_it_answers_raises_or_is_missed(self) -> None:
        assert in_a_child(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            in_a_child(divmod, 7, 0)
        with pytest.raises(ChildProcessError, match=r"a step of the conversion ended with code 3$"):
            in_a_child(os._exit, 3)
        with pytest.raises(ChildProcessError, match="ended with code -9; was there enough memory"):
            in_a_child(_kill_itself)
        with pytest.raises(SystemExit, match="7"):
            in_a_child(sys.exit, 7)

    def test_a_step_is_made_meanwhile_only_where_that_was_asked_for(self, tmp_path: Path) -> None:
        def steps() -> Iterator[int]:
            for number in range(3):
                (tmp_path / str(number)).touch()
                yield number

        with processes.Child(steps) as child:
            assert next(child) == 0
            time.sleep(0.2)
            assert [path.name for path in tmp_path.iterdir()] == ["0"]
            child.begin()
            child.begin()
            wait_for((tmp_path / "1").exists)
            assert next(child) == 1
            time.sleep(0.2)
            assert not (tmp_path / "2").exists()
            assert next(child) == 2
            with pytest.raises(StopIteration):
                next(child)

    def test_a_step_that_is_made_meanwhile_takes_half_of_the_threads(self) -> None:
        def steps() -> Iterator[int]:
            while True:
                yield torch.get_num_threads()

        before = torch.get_num_threads()
        torch.set_num_threads(6)
        try:
            with processes.Child(steps) as child:
                alone = next(child)
                child.begin()
                assert (alone, next(child), next(child)) == (6, 3, 6)
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("how", ["raises", "is not asked for", "is killed", "is gone already"])
    def test_what_becomes_of_a_step_that_was_begun(self, how: str) -> None:
        def steps() -> Iterator[int]:
            yield os.getpid()
            if how == "raises":
                raise ValueError("what is wrong")
            if how == "is killed":
                _kill_itself()
            time.sleep(60)
            yield 0

        start = time.monotonic()
        with processes.Child(steps) as child:
            process = next(child)
            if how == "is gone already":
                os.kill(process, signal.SIGKILL)
                wait_for(lambda: gone(process))
            child.begin()
            if how == "raises":
                with pytest.raises(ValueError, match="what is wrong"):
                    next(child)
            elif how != "is not asked for":
                with pytest.raises(ChildProcessError, match="ended with code -9"):
                    next(child)
        assert gone(process)
        assert time.monotonic() - start < 30

    @pytest.mark.parametrize("begun", [False, True])
    def test_it_ends_with_the_block_that_fails(self, begun: bool) -> None:
        def steps() -> Iterator[int]:
            yield os.getpid()
            time.sleep(60)
            yield 0

        def fail() -> None:
            with processes.Child(steps) as child:
                found.append(next(child))
                if begun:
                    child.begin()
                raise ZeroDivisionError

        found: list[int] = []
        with pytest.raises(ZeroDivisionError):
            fail()
        assert gone(found[0])

    def test_an_interruption_during_the_fork_is_not_lost(self) -> None:
        """What Python calls around a fork may not fail, so that an exception there is dropped."""
        calls: list[signal.Signals] = []
        os.register_at_fork(after_in_parent=lambda: [signal.raise_signal(calls.pop()) for _ in calls[:1]])
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            calls.append(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt), processes.Child(lambda: iter([1])):
                pytest.fail("the block is not entered")
            with processes.Child(lambda: iter([1])) as child:
                assert next(child) == 1
        finally:
            signal.signal(signal.SIGINT, before)

    def test_exceptions_keep_their_trace_and_travel_as_well_as_they_can(self) -> None:
        def fail() -> None:
            {}["a key that is not there"]

        with pytest.raises(KeyError) as caught:
            in_a_child(fail)
        assert "in fail" in str(caught.value.__cause__)

        class Local(Exception):
            """Cannot be packed."""

        def raise_local() -> None:
            raise Local("what it says")

        with pytest.raises(RuntimeError, match=r"^Local: what it says$"):
            in_a_child(raise_local)

    def test_it_uses_threads_after_its_parent_did(self) -> None:
        """A fork leaves OpenMP's pool behind, and whoever waits for it waits forever."""
        code = """
import torch
from st_moe.conversion.processes import in_a_child_if_light
torch.set_num_threads(2)
x = torch.ones(600, 600)
work = lambda: (x @ x).relu().sum().item()
print(work(), in_a_child_if_light(work))
"""
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=True
        )
        assert run.stdout.split() == [str(600.0**3)] * 2

    def test_the_steps_write_what_one_process_writes(
        self, stock: Path, straight: dict[str, bytes], tmp_path: Path
    ) -> None:
        run = subprocess.run(light(stock, tmp_path / "moe"), capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        assert "max relative logit difference" in run.stdout
        assert contents(tmp_path / "moe") == straight

    def test_a_run_that_is_killed_at_any_time_is_gone_on_with(
        self, stock: Path, straight: dict[str, bytes], tmp_path: Path
    ) -> None:
        """SIGKILL for the parent alone, spread over the time that a run takes."""
        start = time.monotonic()
        subprocess.run(light(stock, tmp_path / "whole"), capture_output=True, timeout=120, check=True)
        takes = time.monotonic() - start
        kills = 4
        for number in range(kills):
            with subprocess.Popen(light(stock, tmp_path / "moe"), stdout=subprocess.DEVNULL) as run:
                time.sleep(takes * (number + 1) / (kills + 1))
                run.kill()
            assert not (tmp_path / "moe").exists() or contents(tmp_path / "moe") == straight
            if (tmp_path / "moe").exists():
                break
        else:
            subprocess.run(light(stock, tmp_path / "moe"), capture_output=True, timeout=120, check=True)
        assert contents(tmp_path / "moe") == straight

    @pytest.mark.parametrize("step", ["plan", "dense run", "weights", "proof"])
    def test_no_step_outlives_its_run(self, step: str, stock: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
        code = f"""
import os, sys, time
from pathlib import Path
from st_moe.conversion import folder

def wait(*arguments):
    Path(sys.argv[3]).write_text(str(os.getpid()))
    time.sleep(60)

def steps(*arguments):
    for name, value in zip(["plan", "dense run", "proof"], real(*arguments)):
        if name == {step!r}:
            wait()
        yield value

real, folder._steps_with_models = folder._steps_with_models, steps
if {step!r} == "weights":
    folder._write_weights = wait
folder.upcycle_checkpoint(sys.argv[1], sys.argv[2], num_experts=3, recipe="noise", max_shard_size="60KB")
"""
        noted = tmp_path / "noted"
        command = [sys.executable, "-c", code, str(stock), str(tmp_path / "moe"), str(noted)]
        with subprocess.Popen(command) as run:
            wait_for(lambda: noted.exists() and noted.read_text(encoding="utf-8"))
            process = int(noted.read_text(encoding="utf-8"))
            assert process != run.pid
            os.kill(process, 0)
            run.kill()
        # At once, while the other may still be dying.
        upcycle_checkpoint(stock, tmp_path / "moe", num_experts=3, recipe="noise", max_shard_size="60KB")
        wait_for(lambda: gone(process), 10)
        assert contents(tmp_path / "moe") == straight

    @pytest.mark.parametrize("verify", [True, False])
    def test_the_dense_model_runs_while_weights_are_written(
        self, verify: bool, stock: Path, straight: dict[str, bytes], tmp_path: Path
    ) -> None:
        """Without a proof the process that could run it has ended by then."""
        code = f"""
import multiprocessing, sys, time
from pathlib import Path
from st_moe.conversion import folder

def steps(*arguments):
    for number, value in enumerate(real_steps(*arguments)):
        if number == 1:
            Path(sys.argv[3]).touch()
        yield value

def write(*arguments):
    last = time.monotonic() + 30
    while {verify} and not Path(sys.argv[3]).exists():
        assert time.monotonic() < last
        time.sleep(0.01)
    return real_write(*arguments)

def write_in_a_child(function, *arguments):
    if function is write:
        assert len(multiprocessing.active_children()) == {int(verify)}
    return real_child(function, *arguments)

real_steps, folder._steps_with_models = folder._steps_with_models, steps
real_write, folder._write_weights = folder._write_weights, write
real_child, folder.in_a_child_if_light = folder.in_a_child_if_light, write_in_a_child
fields = dict(num_experts=3, recipe="noise", max_shard_size="60KB", verify={verify})
folder.upcycle_checkpoint(sys.argv[1], sys.argv[2], **fields)
assert Path(sys.argv[3]).exists() == {verify}
"""
        command = [sys.executable, "-c", code, str(stock), str(tmp_path / "moe"), str(tmp_path / "marker")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        written = contents(tmp_path / "moe")
        assert {name for name in written if written[name] != straight[name]} == (set() if verify else {"README.md"})

    def test_a_failing_write_leaves_nothing_of_the_dense_run(self, stock: Path, tmp_path: Path) -> None:
        """Its process is killed with files on the disk that nobody else would remove."""
        code = """
import sys, time
from pathlib import Path
from st_moe.conversion import folder

offload = Path(sys.argv[2] + ".partial", "offload")

def steps(*arguments):
    yield next(real(*arguments))
    offload.mkdir()
    (offload / "half").touch()
    time.sleep(60)

def fail(*arguments):
    while not (offload / "half").exists():
        time.sleep(0.01)
    raise OSError(28, "No space left on device")

real, folder._steps_with_models, folder._write_weights = folder._steps_with_models, steps, fail
try:
    folder.upcycle_checkpoint(sys.argv[1], sys.argv[2], num_experts=3)
except OSError as error:
    assert "is full; make room" in str(error), error
    assert offload.parent.exists() and not offload.exists()
else:
    raise AssertionError
"""
        command = [sys.executable, "-c", code, str(stock), str(tmp_path / "moe")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stderr

    def test_an_interrupted_run_says_so_in_one_line(
        self, stock: Path, straight: dict[str, bytes], tmp_path: Path
    ) -> None:
        command = [str(Path(sys.executable).with_name("st-moe")), "upcycle", str(stock), str(tmp_path / "moe")]
        command += ["--num-experts", "3", "--recipe", "noise", "--max-shard-size", "60KB"]
        # Who runs in the background of a shell is started with the signal ignored, and so are its children.
        listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listening
        ) as run:
            wait_for(lambda: (tmp_path / "moe.partial").exists())
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does
            _, errors = run.communicate(timeout=30)
        assert (run.returncode, errors.count("\n")) == (130, 1), errors
        assert "interrupted" in errors
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        assert contents(tmp_path / "moe") == straight


def resident(path: Path) -> int:
    """Kilobytes of this process's memory that are mapped from a file."""
    found = re.findall(rf"{path}\nSize:.*?\nRss: +(\d+) kB", Path("/proc/self/smaps").read_text("utf-8"), re.DOTALL)
    return sum(map(int, found))


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
@pytest.mark.parametrize("operation", ["linear", "expert", "keyword", "stack"])
def test_pages_of_mapped_weights_are_given_back(operation: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    drawn = torch.randn(2, 2048, 1024, generator=torch.Generator().manual_seed(0))
    save_file({"weight": drawn}, path)
    x = torch.ones(1, 1024)
    with safe_open(path, "pt") as file:
        mapped = nn.Parameter(file.get_tensor("weight"))

    def run() -> torch.Tensor:
        if operation == "stack":
            return torch.stack([each[:512] for each in mapped])  # 2 MB each, which is little
        if operation == "expert":
            return nn.functional.linear(x, mapped.unbind(0)[1])
        return (
            nn.functional.linear(x, weight=mapped[1]) if operation == "keyword" else nn.functional.linear(x, mapped[1])
        )

    with torch.no_grad():
        expected = run()
        assert resident(path) >= 2048  # kilobytes
        with GivingBack():
            found = run()
    assert resident(path) < 256  # its ends may be read ahead
    assert torch.equal(found, expected)
    assert torch.equal(mapped[1], drawn[1])


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_freed_memory_is_returned_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time would make a proof slower; never, larger."""
    save_file({"weight": torch.ones(2048, 1024)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        mapped = file.get_tensor("weight")
    returned: list[int] = []
    monkeypatch.setattr(giving_back, "_BETWEEN_RETURNS", 3 * mapped.nbytes - 5 * mmap.PAGESIZE)
    with GivingBack():
        for number in range(1, 11):
            monkeypatch.setattr(giving_back, "return_freed_memory", partial(returned.append, number))
            assert mapped.sum() == mapped.numel()
    assert returned == [3, 6, 9]


def test_weights_that_were_written_to_are_kept(tmp_path: Path) -> None:
    """Their pages are no longer those of the file."""
    save_file({"weight": torch.ones(2048, 1024)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        mapped = file.get_tensor("weight")
    mapped[7] = 0.0
    with GivingBack():
        for _ in range(2):
            assert mapped.sum() == 2047 * 1024


def test_sparse_tensors_are_let_through() -> None:
    """They have no bytes in one place."""
    sparse = torch.eye(3).to_sparse()
    with GivingBack():
        assert torch.equal(torch.sparse.mm(sparse, torch.ones(3, 2)), torch.ones(3, 2))


def test_no_other_memory_is_given_back() -> None:
    weight, x = torch.ones(2048, 1024), torch.ones(4096, 1024)
    with GivingBack(), torch.no_grad():
        nn.functional.linear(x, weight)
        x.mul_(2.0)
        assert torch.equal(torch.cat([x, x])[4096:], x)
    assert (weight == 1).all()
    assert (x == 2).all()


@pytest.mark.skipif(sys.platform != "linux", reason="mmap of Linux")
@pytest.mark.parametrize("believed", [False, True])
def test_memory_in_the_place_of_a_mapping_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, believed: bool
) -> None:
    """A mapping that was seen is not believed to be there still; if it were, what is there now would be lost."""
    (tmp_path / "file").write_bytes(bytes(2**23))
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 2**23, mmap.MAP_PRIVATE)
    tensor = torch.frombuffer(mapped, dtype=torch.uint8)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    with GivingBack():
        assert tensor.sum() == 0
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        place = libc.mmap(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(2**23), 3, fixed, -1, ctypes.c_long(0))
        assert place == tensor.data_ptr()
        ctypes.memset(place, 1, 2**23)
        if believed:
            monkeypatch.setattr(giving_back, "_is_there", lambda mapping: True)
        assert tensor.sum() == 2**23
        assert tensor.sum() == (0 if believed else 2**23)
