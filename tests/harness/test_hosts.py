"""Which hosts of a cluster can run a cell, and what it takes of them, by made-up answers of hosts. No cluster here."""

import pytest

from harness.cell import Cell, Mode
from harness.executors.hosts import ClusterError, Lack, Member, agree, hardware_of, largest_room, place, site_of
from harness.executors.lent import Probe
from harness.hardware import Hardware
from harness.matrix import skip_reason
from harness.server.log import Cause

NEW = (("vllm", "0.32.0"), ("torch", "2.13.0"))
CPU_VERSIONS = (("vllm", "0.32.0"), ("torch", "2.13.0+cpu"))
CELL = Cell(mode=Mode.HELIX_GQA, backend="FLASH_ATTN", hardware="hopper", model="recipe:llama-k4", tp=8, kvp=2)
WIDE = CELL.model_copy(update={"tp": 16})
ON_CPU = CELL.model_copy(update={"hardware": "cpu", "backend": "HELIX_CPU", "tp": 2})


def gpu(name: str, gpus: int = 8, **said) -> Member:
    device = Hardware(family="hopper", name="H200", count=gpus, memory_bytes=2**37, compute_capability="9.0")
    answer = Probe(**{"host": name, "hardware": (device,), "code": "c", "versions": NEW, **said})
    return Member(node=name, address=f"10.0.0.{len(name)}", cores=64, gpus=gpus, probe=answer)


def cpu(name: str, cores: int = 4, **said) -> Member:
    device = Hardware(family="cpu", name="CPU", count=cores, memory_bytes=cores * 2**30)
    answer = Probe(**{"host": name, "hardware": (device,), "code": "c", "versions": CPU_VERSIONS, **said})
    return Member(node=name, cores=cores, probe=answer)


def test_a_cell_goes_to_hosts_with_its_hardware():
    found = place(CELL, [gpu("b"), cpu("head"), gpu("a"), gpu("small", gpus=4)])
    assert (found.hosts, found.ranks, found.gpus, found.cores, found.nodes) == (1, 8, 8, 8, ("a", "b"))
    assert place(ON_CPU, [gpu("b"), cpu("head"), cpu("one", cores=1)]).nodes == ("head", "one")


def test_a_family_whose_last_host_died_leaves_a_reason_and_no_waiting():
    assert place(CELL, [cpu("head")]) == Lack("no living host of the cluster has hopper", Cause.OTHER)
    assert place(CELL, []).reason == "no living host of the cluster has hopper"
    few = place(CELL, [gpu("small", gpus=3)])
    assert few.reason == "needs 8 GPUs; the living hosts with hopper lend 3"


def test_a_label_speaks_for_a_host():
    labelled = gpu("a").model_copy(update={"says": "blackwell"})
    assert isinstance(place(CELL, [labelled]), Lack)
    assert place(CELL.model_copy(update={"hardware": "blackwell"}), [labelled]).nodes == ("a",)
    assert [device.family for device in labelled.hardware] == ["blackwell"]


def test_a_model_that_only_some_offline_hosts_have_is_served_there():
    hub = CELL.model_copy(update={"model": "org/model"})
    there = gpu("has", offline=True, models=("org/model",))
    assert place(hub, [gpu("lacks", offline=True), there, gpu("fetches")]).nodes == ("fetches", "has")
    nowhere = place(hub, [gpu("lacks", offline=True)])
    assert nowhere.cause is Cause.MISSING_MODEL and "all are offline" in nowhere.reason
    assert place(CELL, [gpu("lacks", offline=True)]).nodes == ("lacks",)  # a recipe is made on the spot


def test_a_host_without_an_image_is_left_out():
    without = gpu("without", problem="no image of this code")
    assert place(CELL, [without, gpu("with")], "docker").nodes == ("with",)
    assert place(CELL, [without], "docker").cause is Cause.MISSING_IMAGE


def test_a_cell_larger_than_a_host_takes_equal_parts_of_the_fewest_that_hold_it():
    found = place(WIDE, [gpu("a"), gpu("b"), gpu("c"), gpu("small", gpus=4)])
    assert (found.hosts, found.ranks, found.gpus, found.nodes) == (2, 8, 8, ("a", "b", "c"))
    # of 8 and 4 and 4 and 4 GPUs: two hosts do not hold 8 each, four hold 4 each
    mixed = place(WIDE, [gpu("a"), *(gpu(name, gpus=4) for name in ("b", "c", "d"))])
    assert (mixed.hosts, mixed.ranks, mixed.nodes) == (4, 4, ("a", "b", "c", "d"))
    assert place(WIDE, [gpu("a"), gpu("small", gpus=4)]).reason.endswith("lend 8 + 4")
    assert "containers do not span" in place(WIDE, [gpu("a"), gpu("b")], "docker").reason
    shared = WIDE.model_copy(update={"helix": (("share_gpu", True),)})
    assert place(shared, [gpu("a"), gpu("b")]).gpus == 1


def test_cpu_ranks_stay_together_unless_told():
    hosts = [cpu("a"), cpu("b")]
    assert place(ON_CPU, hosts).hosts == 1
    assert place(ON_CPU, hosts, cpu_ranks=1).hosts == 2


def test_the_plan_knows_what_several_hosts_hold():
    (found,) = hardware_of([gpu("a"), gpu("b"), gpu("small", gpus=4)])
    assert (found.count, found.hosts) == (8, 2) and "2 hosts of 8 x H200" in str(found)
    assert skip_reason(WIDE, [found]) is None
    assert "2 hosts have 8 each" in skip_reason(WIDE.model_copy(update={"tp": 32}), [found])
    assert "this host has 8" in skip_reason(WIDE, [found.model_copy(update={"hosts": 1})])


def test_hosts_of_one_family_agree_and_others_may_differ():
    agree([gpu("a"), gpu("b"), cpu("head")], "c")
    with pytest.raises(ClusterError, match=r"hosts with hopper have different versions: a: .*; b: vllm 0\.31\.0"):
        agree([gpu("a"), gpu("b", versions=(("vllm", "0.31.0"),))], "c")
    with pytest.raises(ClusterError, match="other code of ours: b"):
        agree([gpu("a"), gpu("b", code="d")], "c")


def test_the_setting_of_a_run_does_not_hang_on_how_many_hosts_live():
    whole, less = site_of([cpu("head"), gpu("a"), gpu("b", gpus=4)]), site_of([gpu("b", gpus=4), cpu("head")])
    assert whole.kinds == less.kinds == ("cpu (CPU)", "hopper (H200)") and whole.hardware != less.hardware
    assert whole.versions_of("hopper") == NEW and whole.versions_of("cpu") == CPU_VERSIONS
    assert whole.all_versions == less.all_versions == (
        ("torch (cpu)", "2.13.0+cpu"), ("torch (hopper)", "2.13.0"), ("vllm", "0.32.0"),
    )  # fmt: skip


def test_the_largest_host_says_what_fits_nowhere():
    room = largest_room([cpu("a", cores=4), cpu("b", cores=16), gpu("c")])
    assert (room.cores, room.memory_bytes) == (16, 16 * 2**30)
