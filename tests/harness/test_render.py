"""Rendered runs: what a task takes, valid scripts and manifests, and outputs that `merge` takes. No cluster is here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from test_merge_runs import BASE, HELIX, OTHER

from harness import cli
from harness.cell import DEFAULT_VLLM, Cell
from harness.executors.kubernetes import KubernetesOptions, manifests, script
from harness.executors.slurm import SlurmOptions, sbatch
from harness.executors.tasks import LARGEST, Group, tasks_of
from harness.matrix import PlannedCell
from harness.need import need_of
from harness.report.run import load
from harness.suite import Family
from harness.verdict import Verdict

#: Stands in for `python3 -m harness`: writes the ledger that a run of this cell leaves.
STUB = """#!{python}
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from test_merge_runs import BASE, HELIX, OTHER, result, run_of
words = sys.argv[1:]
if "--resume" in words:
    folder = Path(words[words.index("--resume") + 1])
    (folder / "resumed").touch()
else:
    folder = Path(words[words.index("--run-dir") + 1])
    cell = next(cell for cell in (HELIX, OTHER) if cell.id == words[words.index("--cell") + 1])
    run_of(folder, [result(BASE), result(cell)], keys={{BASE.id: "alike"}})
"""
KINDS = ("1.30", "1.33")


def planned(cell: Cell, **fields) -> PlannedCell:
    base = None if cell.baseline else BASE
    return PlannedCell(
        cell=cell, suites=("s",), declared=Verdict.PASS, declared_why="w", baseline=base, **fields
    )  # fmt: skip


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """`srun` and `python3` on PATH that stand for the cluster and the harness."""
    folder = tmp_path / "bin"
    folder.mkdir()
    text = STUB.format(python=sys.executable, tests=str(Path(__file__).parent), root=str(Path(cli.__file__).parents[1]))
    for name in ("srun", "python3"):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_task_is_a_cell_with_its_baselines_and_takes_the_most_of_them():
    wide = HELIX.model_copy(update={"tp": 16, "kvp": 4})
    lone = BASE.model_copy(update={"backend": "FLASHINFER", "tp": 2})
    plan = [planned(BASE), planned(HELIX, skip="no hopper here"), planned(OTHER), planned(wide), planned(lone)]
    tasks = tasks_of(plan, gpus_per_node=8, cores_per_node=64)
    assert [(group.name, group.gpus, group.cells) for group in tasks.groups] == [
        ("hopper-4gpu", 4, (HELIX.id, OTHER.id)), ("hopper-2gpu", 2, (lone.id,))
    ]  # fmt: skip
    assert tasks.left_out == {wide.id: "needs 16 GPUs; a node has 8"}
    assert tasks.runs == (BASE.id, HELIX.id, OTHER.id, lone.id)


def test_a_gpu_task_has_spare_cores_as_far_as_its_part_of_the_node_has_them():
    lone = BASE.model_copy(update={"backend": "FLASHINFER", "tp": 2})
    plan = [planned(BASE), planned(HELIX), planned(lone)]
    for node, cores in ((64, [7, 5]), (12, [6, 3]), (8, [4, 2])):  # 4 ranks, 2 ranks
        assert [group.cores for group in tasks_of(plan, gpus_per_node=8, cores_per_node=node).groups] == cores


def test_memory_is_asked_for_where_it_is_given(tmp_path, capsys):
    for number, more in enumerate(((), ("--memory", "64G"))):
        assert rendered(capsys, *SLURM, "--into", tmp_path / f"s{number}", *more)[0] == 0
        lines = (tmp_path / f"s{number}" / "hopper-8gpu.sbatch").read_text().splitlines()
        assert [line for line in lines if "--mem" in line] == (["#SBATCH --mem=65536M"] if more else [])
        assert rendered(capsys, *KUBERNETES, "--into", tmp_path / f"k{number}", *more)[0] == 0
        job = [*yaml.safe_load_all((tmp_path / f"k{number}" / "hopper-8gpu.yaml").read_text())][1]
        assert kubernetes_validate.validate(job, KINDS[-1], strict=True) == KINDS[-1]
        for asked in job["spec"]["template"]["spec"]["containers"][0]["resources"].values():
            assert asked.get("memory") == ("65536Mi" if more else None)
    cpu = HELIX.model_copy(update={"hardware": "cpu"})
    for given, asked in ((0, need_of(cpu, 8).memory_bytes), (2**40, 2**40)):
        assert tasks_of([planned(cpu)], 8, 8, given).groups[0].memory_bytes == asked > 0


def test_cells_that_no_node_holds_are_counted_by_reason_and_not_expected(tmp_path, capsys):
    words = ("--suite", "several-gpus", "--hardware", "hopper", "--gpus-per-node", "2", "--into")
    status, told = rendered(capsys, "slurm", *words, tmp_path / "a")
    everything = rendered(capsys, "slurm", *words, tmp_path / "b", "-v")[1]
    expected = set(load(tmp_path / "a" / "runs" / "plan").unfinished)
    assert status == 0 and expected and not [cell for cell in expected if "/tp4" in cell or "/tp8" in cell]
    lists = (tmp_path / "a").glob("*.txt")
    run = {cell for file in lists for cell in file.read_text().splitlines()}
    assert run <= expected and not [cell for cell in expected if cell in everything]
    counts = [int(count) for count in re.findall(r"left out: (\d+) cells?: needs [48] GPUs; a node has 2\n", told)]
    assert len(counts) == 2 and everything.count("  hopper/") == sum(counts) > told.count("  hopper/") == 6
    assert f"  and {counts[0] - 3} more; all: -v\n" in told and "more; all" not in everything
    assert told.rindex("left out:") < told.index("submit:")


def test_a_large_group_is_cut():
    cells = [HELIX.model_copy(update={"env": (("N", str(n)),), "interleave": n}) for n in range(1, LARGEST + 3)]
    tasks = tasks_of([planned(cell) for cell in cells], 8, 8)
    assert [(group.name, len(group.cells)) for group in tasks.groups] == [("hopper-4gpu", 1000), ("hopper-4gpu-2", 2)]


def test_slurm_scripts_pass_bash_and_name_what_they_take(tmp_path, capsys):
    words = ["render", "slurm", "--hardware", "hopper", "--suite", "helix-gqa", "--into", str(tmp_path / "r")]
    assert cli.main([*words, "--image", "docker://reg/helix:1", "--select", "hopper=h200", "--partition", "gpu"]) == 0
    text = (tmp_path / "r" / "hopper-8gpu.sbatch").read_text()
    lines = text.splitlines()
    count = len((tmp_path / "r" / "hopper-8gpu.txt").read_text().splitlines())
    for directive in (f"--array=0-{count - 1}%16", "--gpus-per-node=8", "--constraint=h200", "--partition=gpu"):
        assert f"#SBATCH {directive}" in lines
    assert "--container-image=docker://reg/helix:1" in lines[-1] and "python3 -m harness" in lines[-1]
    assert 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --container-image' in lines[-1]
    assert (tmp_path / "r" / "runs" / "log").is_dir()  # `sbatch` of one script needs it too
    assert cli.main(words) == 2  # the folder is used


def test_what_array_tasks_leave_is_merged_by_name(tmp_path, stub, capsys):
    group = Group(name="hopper-4gpu", hardware="hopper", gpus=4, cores=4, memory_bytes=0, cells=(HELIX.id, OTHER.id))
    options = SlurmOptions(
        mark="1a2b3c4d", root=tmp_path, runs=tmp_path / "runs", lists=tmp_path, arguments=("--suite", "s")
    )
    (tmp_path / "hopper-4gpu.txt").write_text("".join(f"{cell}\n" for cell in group.cells))
    (tmp_path / "job").write_text(sbatch(group, options))
    for index in ("0", "1", "1"):  # the second is requeued
        subprocess.run(
            ["bash", str(tmp_path / "job")],
            env={**stub, "SLURM_ARRAY_TASK_ID": index, "SLURM_CPUS_PER_TASK": "4"},
            check=True,
        )
    assert (tmp_path / "runs" / "hopper-4gpu-1a2b3c4d-1" / "resumed").exists()
    assert cli.main(["merge", str(tmp_path / "runs"), "--into", str(tmp_path / "all")]) == 0
    assert {one.cell.id for one in load(tmp_path / "all").results} == {BASE.id, HELIX.id, OTHER.id}


@pytest.mark.parametrize("version", KINDS)
def test_manifests_fit_the_published_schema(version):
    group = Group(name="hopper-4gpu", hardware="hopper", gpus=4, cores=4, memory_bytes=0, cells=(HELIX.id, OTHER.id))
    cpu = group.model_copy(update={"name": "cpu-4core", "hardware": "cpu", "gpus": 0, "memory_bytes": 3 * 2**30})
    for one in (group, cpu):
        for manifest in manifests(one, KubernetesOptions(mark="1a2b", image="reg/helix:1", models="hub")):
            read_back = yaml.safe_load(yaml.safe_dump(manifest))
            assert kubernetes_validate.validate(read_back, version, strict=True) == version


def test_a_job_has_one_index_a_cell_and_takes_gpus_of_the_family():
    group = Group(name="hopper-4gpu", hardware="hopper", gpus=4, cores=4, memory_bytes=0, cells=(HELIX.id, OTHER.id))
    cells, job = manifests(group, KubernetesOptions(mark="1a2b", image="reg/helix:1", at_once=8))
    assert cells["data"]["cells.txt"].split() == [HELIX.id, OTHER.id]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.family": "hopper"}
    other = manifests(group, KubernetesOptions(mark="1a2b", image="i", select=(("hopper", "gpu/type=h200"),)))[1]
    assert other["spec"]["template"]["spec"]["nodeSelector"] == {"gpu/type": "h200"}


def test_a_manifest_with_a_slip_does_not_fit():
    group = Group(name="g", hardware="hopper", gpus=4, cores=4, memory_bytes=0, cells=(HELIX.id,))
    job = manifests(group, KubernetesOptions(mark="1a2b", image="i"))[1]
    job["spec"]["completion"] = job["spec"].pop("completions")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KINDS[-1], strict=True)


def test_what_pods_leave_is_merged_and_a_pod_that_never_ran_is_missing_by_name(tmp_path, stub, capsys):
    group = Group(name="hopper-4gpu", hardware="hopper", gpus=4, cores=4, memory_bytes=0, cells=(HELIX.id, OTHER.id))
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "cells.txt").write_text(
        manifests(group, KubernetesOptions(mark="1a2b", image="i"))[0]["data"]["cells.txt"]
    )
    text = script(group, KubernetesOptions(mark="1a2b", image="i"), str(tmp_path / "runs"), str(tmp_path / "cells"))
    environment = {**stub, "JOB_COMPLETION_INDEX": "1"}
    subprocess.run(["/bin/bash", "-euc", text, "cell"], env=environment, check=True)
    from test_merge_runs import run_of

    from harness.chosen import Chosen

    plan = run_of(tmp_path / "plan", [], [BASE.id, HELIX.id, OTHER.id], Chosen(suites=("s",)))
    assert cli.main(["merge", str(tmp_path / "runs"), str(plan), "--into", str(tmp_path / "all")]) == 3
    assert f"expected 3, got 2\n  missing: {HELIX.id} (planned by plan)" in capsys.readouterr().out


def test_render_writes_the_plan_that_merge_expects(tmp_path, capsys):
    words = ["render", "kubernetes", "--hardware", "hopper", "--suite", "helix-gqa", "--into", str(tmp_path / "k")]
    assert cli.main(words) == 2 and "--image" in capsys.readouterr().err
    assert cli.main([*words[:-1], str(tmp_path / "j"), "--image", "reg/helix:1"]) == 0
    cells = [
        document["data"]["cells.txt"].split()
        for file in (tmp_path / "j").glob("*.yaml")
        for document in yaml.safe_load_all(file.read_text())
        if document["kind"] == "ConfigMap"
    ]
    expected = set(load(tmp_path / "j" / "plan").unfinished)
    assert {cell for group in cells for cell in group} < expected  # baselines come with the others


def rendered(capsys, *words) -> tuple[int, str]:
    """Exit status, and what was said."""
    try:
        status = cli.main(["render", *map(str, words)])
    except SystemExit as ended:
        status = ended.code
    told = capsys.readouterr()
    return status, told.out + told.err


HOPPER = ("--hardware", "hopper", "--suite", "helix-gqa")
SLURM, KUBERNETES = ("slurm", *HOPPER), ("kubernetes", *HOPPER, "--image", "reg/helix:1")


def test_another_rendering_in_the_same_place_finds_no_run_of_an_earlier_one(tmp_path, stub, capsys):
    environment = {**stub, "SLURM_CPUS_PER_TASK": "4"}
    group = Group(name="hopper-4gpu", hardware="hopper", gpus=4, cores=4, memory_bytes=0, cells=(HELIX.id, OTHER.id))
    (tmp_path / "hopper-4gpu.txt").write_text(f"{HELIX.id}\n{OTHER.id}\n")
    for mark in ("first", "second"):
        made = SlurmOptions(mark=mark, root=tmp_path, runs=tmp_path / "runs", lists=tmp_path)
        command = ["bash", "-c", sbatch(group, made)]
        subprocess.run(command, env={**environment, "SLURM_ARRAY_TASK_ID": "0"}, check=True)
        pod = script(group, KubernetesOptions(mark=mark, image="i"), str(tmp_path / "volume"), str(tmp_path))
        pod = pod.replace("cells.txt", "hopper-4gpu.txt")
        subprocess.run(["bash", "-euc", pod], env={**environment, "JOB_COMPLETION_INDEX": "0"}, check=True)
    ran = sorted(str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("ledger.ndjson"))
    assert ran == [
        "runs/hopper-4gpu-first-0", "runs/hopper-4gpu-second-0",
        "volume/first/hopper-4gpu-0", "volume/second/hopper-4gpu-0",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("resumed"))


def test_each_rendering_has_a_mark_of_its_own(tmp_path, capsys):
    names, runs = set(), set()
    for night in ("a", "b"):
        status, told = rendered(capsys, *KUBERNETES, "--into", tmp_path / night)
        documents = [*yaml.safe_load_all((tmp_path / night / "hopper-8gpu.yaml").read_text())]
        names |= {document["metadata"]["name"] for document in documents}
        mark = documents[1]["metadata"]["name"].rpartition("-")[2]
        assert status == 0 and f"copy folder {mark} of claim helix-runs" in told
        assert documents[1]["spec"]["template"]["spec"]["volumes"][1]["configMap"]["name"].endswith(mark)
        assert rendered(capsys, *SLURM, "--into", tmp_path / f"s{night}")[0] == 0
        lines = (tmp_path / f"s{night}" / "hopper-8gpu.sbatch").read_text().splitlines()
        runs |= {line.rpartition("/")[2] for line in lines if line.startswith("run=")}
    assert len(names) == len(runs) == 2


def test_a_folder_for_runs_that_holds_a_plan_is_refused(tmp_path, capsys):
    assert rendered(capsys, *SLURM, "--into", tmp_path / "a", "--runs", tmp_path / "runs")[0] == 0
    plan = tmp_path / "runs" / "plan" / "ledger.ndjson"
    before = plan.read_bytes()
    status, told = rendered(capsys, *SLURM, "--into", tmp_path / "b", "--runs", tmp_path / "runs")
    assert status == 2 and f"holds the plan of another rendering ({plan}); name a new folder" in told
    assert plan.read_bytes() == before and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*SLURM, "--at-once", "0"), "--at-once: '0'; allowed: a whole number from 1 on"),
        ((*SLURM, "--at-once", "many"), "--at-once: 'many'; allowed: a whole number"),
        ((*SLURM, "--gpus-per-node", "0"), "--gpus-per-node: '0'; allowed: a whole number"),
        ((*SLURM, "--cores", "-1"), "--cores: '-1'; allowed: a whole number"),
        ((*SLURM, "--gpus-per-node", "1"), "needs 8 GPUs; a node has 1"),
        ((*SLURM, "--time", "00:00:00"), "allowed: HH:MM:SS, more than none"),
        ((*SLURM, "--image", "a b"), "--image: 'a b'; allowed: the name of an image, without white space"),
        ((*SLURM, "--partition", "gpu --exclusive"), "--partition: 'gpu --exclusive'; allowed: a name"),
        ((*SLURM, "--account", "a\nb"), "--account: 'a\nb'; allowed: a name"),
        ((*SLURM, "--select", "hopper=a/b=c"), "'a/b=c' is not for slurm; allowed: the name of one feature"),
        ((*SLURM, "--select", "hopper=a", "--select", "hopper=b"), "is given 2 times; allowed: once"),
        ((*SLURM, "--vllm", "new"), "--vllm: 'new'; allowed: a release such as"),
        ((*SLURM, "--vllm", "0.28.0"), "without --image tasks run ./test_helix.sh, which installs vLLM"),
        ((*SLURM, "--memory", "64GB"), "--memory: '64GB'; allowed: a whole number with M, G or T"),
        ((*SLURM, "--claim", "c", "--namespace", "n"), "--claim, --namespace: of `render kubernetes` only"),
        ((*SLURM, "--runs", "/tmp/a b"), "/tmp/a b: Slurm's options and mounts take no white space"),
        (("kubernetes", *HOPPER), "--image is needed"),
        ((*KUBERNETES, "--partition", "gpu"), "--partition: of `render slurm` only; leave it out"),
        ((*KUBERNETES, "--runs", "r"), "--runs: of `render slurm` only"),
        ((*KUBERNETES, "--namespace", "My_Space"), "--namespace: 'My_Space'; allowed: at most 63 of a-z"),
        ((*KUBERNETES, "--claim", "Runs"), "--claim: 'Runs'; allowed: the name of a volume claim"),
        ((*KUBERNETES, "--select", "hopper=h200"), "'h200' is not for kubernetes; allowed: LABEL=VALUE"),
        ((*KUBERNETES, "--select", "hopper=-x/y=h200"), "'-x/y=h200' is not for kubernetes"),
        ((*KUBERNETES[:-1], "docker://reg/helix:1"), "Kubernetes takes no scheme; write reg/helix:1"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, capsys, words, says):
    status, told = rendered(capsys, *words, "--into", tmp_path / "new")
    assert status == 2 and says in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", [(), ("new",)])
def test_a_folder_that_cannot_be_made_is_said(tmp_path, capsys, below):
    (tmp_path / "file").touch()
    into = (tmp_path / "file").joinpath(*below)
    status, told = rendered(capsys, *KUBERNETES, "--into", into)
    assert status == 2 and told.startswith("render: error: ") and str(into) in told and "name" in told


def test_cells_of_another_release_are_left_out_by_name_and_not_expected(tmp_path, capsys):
    words = ("kubernetes", "--hardware", "hopper", "--suite", "version-sweep", "--image", "reg/i:1", "--into")
    for vllm, more in ((DEFAULT_VLLM, ()), ("0.29.0", ("--vllm", "0.29.0"))):
        status, told = rendered(capsys, *words, tmp_path / vllm, *more, "-v")
        assert (
            status == 0 and f"needs vLLM 0.28.0; tasks have {vllm} (render it apart: --vllm 0.28.0)\n  hopper/" in told
        )
        expected = load(tmp_path / vllm / "plan").unfinished
        assert expected and all(("vllm=" in cell) == bool(more) and f"  {cell}\n" not in told for cell in expected)
    status, told = rendered(capsys, *words, tmp_path / "none", "--vllm", "0.1.0")
    assert status == 2 and "cells for hopper are left out, as:" in told and not (tmp_path / "none").exists()


def test_pods_for_both_kinds_of_blackwell_are_told_apart():
    chosen = set()
    for family in Family.__args__:
        group = Group(name="g", hardware=family, gpus=0, cores=4, memory_bytes=0, cells=(HELIX.id,))
        job = manifests(group, KubernetesOptions(mark="m", image="i"))[1]
        chosen.add(tuple(job["spec"]["template"]["spec"].get("nodeSelector", {}).items()))
    assert len(chosen) == len(Family.__args__)
    assert {(("nvidia.com/gpu.compute.major", "10"),), (("nvidia.com/gpu.compute.major", "12"),)} < chosen
