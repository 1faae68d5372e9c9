"""One writer of a run on an object store: races have one winner, the dead are replaced, losers write nothing."""

import contextlib
import threading
import time
import uuid

import pytest

from moma_jax.errors import InputError
from moma_jax.runs.checkpoint import Checkpoints, Saved
from moma_jax.runs.directory import RunDir
from moma_jax.runs.status import watched
from moma_jax.storage.directory import Directory
from moma_jax.storage.lease import FILE, Lease, LeaseLost
from moma_jax.upcycling import upcycle

QUICK = {"beat": 0.02, "stale": 0.3}


@pytest.fixture
def path():
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def quick(monkeypatch):
    """Runs whose leases beat and end fast."""
    monkeypatch.setattr("moma_jax.runs.directory.Lease", lambda directory: Lease(directory, **QUICK))


def stop(lease):
    """The holder's process is stopped or cut off: no beat comes any more."""
    lease._stopped.set()
    time.sleep(4 * QUICK["beat"])


def test_of_fifty_races_each_has_one_winner(path):
    for number in range(50):
        leases = [Lease(Directory(f"{path}/{number}"), **QUICK) for _ in range(2)]
        start, refused = threading.Barrier(2), []

        def race(lease, start=start, refused=refused):
            start.wait()
            try:
                lease.take()
            except InputError as error:
                refused.append((lease, str(error)))

        threads = [threading.Thread(target=race, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ((loser, message),) = refused
        (winner,) = set(leases) - {loser}
        winner.require()
        with pytest.raises(LeaseLost):
            loser.require()
        assert "process" in message and "is writing here; stop it, or use another directory" in message
        winner.release()
        assert Directory(f"{path}/{number}").read(FILE) is None


def test_one_that_gives_no_sign_is_replaced_and_finds_out(path, capsys):
    first, second = (Lease(Directory(path), **QUICK) for _ in range(2))
    first.take()
    stop(first)
    begin = time.monotonic()
    second.take()
    assert time.monotonic() - begin >= QUICK["stale"] and "waiting 0 s for a sign of it" in capsys.readouterr().err
    with pytest.raises(LeaseLost, match="took over, as this process gave no sign of life"):
        first.require()
    second.require()
    first.release()  # which takes nothing from the second
    second.require()
    second.release()


def test_one_that_ends_well_leaves_at_once(path):
    for _ in range(3):
        begin, lease = time.monotonic(), Lease(Directory(path), **QUICK)
        lease.take()
        lease.release()
        assert time.monotonic() - begin < QUICK["stale"]


def test_a_beat_that_seemed_to_fail_loses_nothing(path, monkeypatch):
    lease = Lease(Directory(path), beat=60, stale=60)
    lease.take()
    write_if = lease._directory.write_if
    with monkeypatch.context() as patch:

        def cut(*arguments):
            write_if(*arguments)
            raise InputError("the answer was cut off")

        patch.setattr(lease._directory, "write_if", cut)
        with pytest.raises(InputError):
            lease._put(lease._generation)
    lease.require()
    assert lease._put(lease._generation)
    lease.release()
    assert Directory(path).read(FILE) is None


def test_a_lease_that_is_gone_is_told_of(path):
    lease = Lease(Directory(path), beat=60, stale=60)
    lease.take()
    Directory(path)._kv.write(FILE, None).result()
    with pytest.raises(LeaseLost, match="its lease.json is gone"):
        lease.require()


def test_an_upcycle_begins_in_a_bucket_and_clears_nothing_that_is_anothers(path, quick):
    run = RunDir(path)
    with contextlib.ExitStack() as held:
        upcycle._take(run, held)
        stop(run._lease)
        thief = Lease(Directory(path), **QUICK)
        thief.take()
        Directory(path).write("checkpoints/0/state", b"another's")
        with pytest.raises(LeaseLost):
            run.clear("checkpoints")
    assert Directory(path).read("checkpoints/0/state") == b"another's"
    thief.release()


def test_a_writer_that_lost_its_lease_stops_and_changes_nothing(path, quick):
    """Not a record, not a status more; and it is no failed run."""
    run, contents = RunDir(path), lambda: {name: run.read(name) for name in run.names("") if name != FILE}
    thief = Lease(Directory(path), **QUICK)
    with pytest.raises(LeaseLost, match="took over"), run.locked(), watched(run, 8) as status:
        status.write("running")
        stop(run._lease)
        thief.take()
        before = contents()
        with pytest.raises(LeaseLost):
            run.delete("status.json")
        with pytest.raises(LeaseLost):
            status.write("stopped")
        run.write("metrics/0-4.jsonl", b"{}")
    assert contents() == before and "status.json" in before
    thief.require()
    thief.release()


def test_it_begins_no_checkpoint(tmp_path):
    class Lost:
        def require(self):
            raise LeaseLost("another took over")

    run = RunDir(str(tmp_path / "run"))
    run._lease = Lost()
    with Checkpoints(run, write=True) as checkpoints, pytest.raises(LeaseLost):
        checkpoints.save({}, Saved(1, {}, {}))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_second_run_in_the_same_place_is_refused(path, quick):
    run = RunDir(path)
    with run.locked():
        with pytest.raises(InputError, match="is writing here; stop it"), RunDir(path).locked():
            pass
        run.write("more", b"1")
    with RunDir(path).locked():
        pass
