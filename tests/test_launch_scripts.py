"""scripts/*.sh with a stand-in for Python that prints what it was asked to run; the values of configs/sonata; pooling of the six folds."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_sonata
from data.point_classes import BENCHMARKS
from scripts import s3dis_6fold
from utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "semseg-sonata-v1m1-0a-scannet-lin"
READY_MADE = {"scannet_linear": "0a-scannet-lin", "scannet_decoder": "0b-scannet-dec", "scannet_finetune": "0c-scannet-ft",
              "scannet200_linear": "1a-scannet200-lin", "s3dis_linear": "3a-s3dis-lin"}
STAND_IN = """#!/bin/sh
case "$1 $2" in
    "-c "*) echo "${GPUS:-0}" ;;                    # how many are visible?
    "- "*) cat > /dev/null; echo "${THERE-2.13.0}" ;;        # setup.sh asks for the version of PyTorch
    "-m pip") echo "$@" >> "$PIP_LOG" ;;
    *) echo "program=$(basename "$0")"; printf '%s\\n' "$@" ;;
esac
"""


@pytest.fixture
def repository(tmp_path):
    """A copy of scripts and configs with an active virtual environment whose Python is the stand-in."""
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for program in ("python", "other-python"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / program).write_text(STAND_IN)
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "sonata.pth").touch()
    return tmp_path


def launch(repository, *words, gpus=1, shell="bash", script="train", cwd=None, **variables):
    environment = {"PATH": f"{repository / 'bin'}:/usr/bin:/bin", "VIRTUAL_ENV": str(repository), "GPUS": str(gpus),
                   "PIP_LOG": str(repository / "pip.log"), **variables}
    return subprocess.run([shell, str(repository / "scripts" / f"{script}.sh"), *words], cwd=cwd or repository, env=environment,
                          capture_output=True, text=True, timeout=60)


def asked(done):
    """What the stand-in was asked to run."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines[lines.index(next(line for line in lines if line.startswith("program="))) + 1:]


def refused(done, message):
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


TRAINING = ["train_sonata.py", f"configs/sonata/{CONFIG}.yaml", "--output-dir", "exp/sonata/mine", "--pretrained_path", "sonata.pth"]
ARGUMENTS = ("-c", CONFIG, "-n", "mine", "-w", "sonata.pth")


def make_run(repository, name="mine"):
    for file in ("config/config.yaml", "model/model_last.pth"):
        path = repository / "exp" / "sonata" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_syntax(script):
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], capture_output=True).returncode == 0


# -- setup.sh ----------------------------------------------------------------------------------------------------------

def test_a_pytorch_that_is_there_is_left_alone(repository):
    asked(launch(repository, *ARGUMENTS))
    rest = "-m pip install --quiet --disable-pip-version-check -r requirements.txt"
    assert (repository / "pip.log").read_text().splitlines() == [rest]
    done = launch(repository, *ARGUMENTS, THERE="")
    assert (repository / "pip.log").read_text().splitlines()[1:] == [rest.replace("-r requirements.txt", "torch==2.13.0"), rest]
    assert done.stdout.startswith("Installing torch==2.13.0.") and "--index-url https://download.pytorch.org/whl/cpu" in done.stdout


@pytest.mark.parametrize("version, python, printed", [
    ("2.13.0+cpu", (3, 11), "2.13.0+cpu"), ("2.13.0+cu130", (3, 13), "2.13.0+cu130"), ("10.0.0a0+git1234", (3, 12), "10.0.0a0+git1234"),
    (None, (3, 11), ""),                                                # setup.sh installs one
    ("1.13.1", (3, 11), "error: PyTorch 1.13.1 in .* is too old; SegHeads needs .* does not replace what is there"),
    ("2.13.0", (3, 10), "error: Python .* is too old; SegHeads needs 3.11 or newer")])
def test_versions(monkeypatch, capsys, version, python, printed):
    """The Python in setup.sh: prints the version of PyTorch, nothing where there is none, or ends with one line."""
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.chdir(ROOT)
    code, = re.findall(r"<<'PY'\n(.*?)\nPY\n", (ROOT / "scripts" / "setup.sh").read_text(), re.DOTALL)
    try:
        exec(code, {})
    except SystemExit as end:
        print(end.code or "", end="")
    assert re.fullmatch(re.escape(printed) if not printed.startswith("error") else f".*{printed}[^\n]*", capsys.readouterr().out.strip(), re.DOTALL)


# -- train.sh ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_one_process(repository, shell, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert asked(launch(repository, *ARGUMENTS, shell=shell, cwd=elsewhere)) == TRAINING
    assert asked(launch(repository, "-m", "1", "-g", "1", "-d", "sonata", *ARGUMENTS, gpus=4, shell=shell)) == TRAINING


def test_defaults(repository):
    assert asked(launch(repository, "-c", CONFIG)) == [*TRAINING[:3], "exp/sonata/debug"]
    assert asked(launch(repository, "-c", CONFIG, "-w", "None")) == [*TRAINING[:3], "exp/sonata/debug"]


def test_all_visible_gpus_unless_told(repository):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    assert asked(launch(repository, *ARGUMENTS, gpus=4)) == [*torchrun, "4", *TRAINING]
    assert asked(launch(repository, "-g", "2", *ARGUMENTS, gpus=4)) == [*torchrun, "2", *TRAINING]
    refused(launch(repository, "-g", "5", *ARGUMENTS, gpus=4, script="train"), "-g 5: there are 4 visible GPUs")


@pytest.mark.parametrize("words, gpus", [((), 0), (("-g", "4"), 0), (("-g", "0"), 4)])
def test_without_gpu_one_process_on_the_cpu(repository, words, gpus):
    done = launch(repository, *words, *ARGUMENTS, gpus=gpus)
    assert asked(done) == [*TRAINING, "--device", "cpu"] and done.stdout.startswith("no GPU: one process on the CPU\n")


def test_python_of_ones_own_leaves_the_environment_alone(repository):
    done = launch(repository, "-p", "other-python", *ARGUMENTS)
    assert "program=other-python" in done.stdout and asked(done) == TRAINING and not (repository / "pip.log").exists()
    assert "program=python" in launch(repository, *ARGUMENTS).stdout and (repository / "pip.log").exists()
    refused(launch(repository, "-p", "no-python", *ARGUMENTS), "-p no-python: no such program")


def test_another_folder(repository):
    shutil.copytree(repository / "configs" / "sonata", repository / "configs" / "my")
    assert asked(launch(repository, "-d", "my", "-c", CONFIG))[:4] == ["train_sonata.py", f"configs/my/{CONFIG}.yaml", "--output-dir",
                                                                      "exp/my/debug"]
    (repository / "configs" / "my" / "other.yaml").touch()
    refused(launch(repository, "-d", "my", "-c", "other"), "no training script is known for it")


def test_several_machines(repository):
    def machine(*words, **variables):
        return launch(repository, "-m", "2", *words, *ARGUMENTS, gpus=8, **variables)

    words = asked(machine("--node", "1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500"))
    assert words == ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "8",
                     "--master_addr", "10.0.0.1", "--master_port", "29500", *TRAINING]
    assert asked(machine("--node=1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")) == words
    assert asked(machine(SLURM_NODEID="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")) == words
    ports = {asked(machine("--node", node, MASTER_ADDR="10.0.0.1"))[11] for node in "01"}
    assert len(ports) == 1 and 1024 < int(ports.pop()) < 32768                      # agreed on without talking
    assert asked(launch(repository, "-g", "1", *ARGUMENTS, SLURM_NODEID="1")) == TRAINING
    refused(machine(MASTER_ADDR="10.0.0.1"), "-m 2: say which one this is, --node 0 to 1")
    refused(machine("--node", "2", MASTER_ADDR="10.0.0.1"), "--node 2: with -m 2")
    refused(machine("--node", "0"), "set MASTER_ADDR")

    (repository / "bin" / "scontrol").write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (repository / "bin" / "scontrol").chmod(0o755)
    assert asked(machine(SLURM_NODEID="0", SLURM_JOB_NODELIST="n[1-2]"))[8:10] == ["--master_addr", "n1"]


def test_resume(repository):
    refused(launch(repository, *ARGUMENTS, "-r", "true"), "-r true: exp/sonata/mine holds no run to go on with")
    make_run(repository)
    own = ["train_sonata.py", "exp/sonata/mine/config/config.yaml", "--output-dir", "exp/sonata/mine"]
    assert asked(launch(repository, "-n", "mine", "-r", "true")) == [*own, "--resume", "auto"]
    assert asked(launch(repository, *ARGUMENTS, "-r", "true", "--", "--num-workers", "2")) == [
        *own, "--pretrained_path", "sonata.pth", "--num-workers", "2", "--resume", "auto"]
    assert asked(launch(repository, *ARGUMENTS, "-r", "false")) == TRAINING
    (repository / "exp/sonata/mine/model/model_last.pth").unlink()
    refused(launch(repository, "-n", "mine", "-r", "true"), "-r true: exp/sonata/mine holds no run to go on with")


def test_further_arguments(repository):
    for dashes in (["--"], []):
        assert asked(launch(repository, *ARGUMENTS, *dashes, "data.train=[Area 1, Area_2]", "--num-workers", "0")) == [
            *TRAINING, "data.train=[Area 1, Area_2]", "--num-workers", "0"]
    assert asked(launch(repository, *ARGUMENTS, "--", "--limit-batches", "2")) == [*TRAINING, "--limit-batches", "2"]
    assert asked(launch(repository, *ARGUMENTS, "--", "--device", "mps", gpus=0))[-4:] == ["--device", "cpu", "--device", "mps"]


@pytest.mark.parametrize("words, message", [
    ((), "-c '': no configs/sonata/.yaml; in configs/sonata there are: "),
    (("-c", "nope"), "no configs/sonata/nope.yaml; in configs/sonata there are: concerto-s3dis "),
    (("-c", CONFIG, "-d", "nope"), "in configs/nope there are: none"),
    (("-c", CONFIG, "-w", "nope.pth"), "-w nope.pth: no such file"),
    (("-c", CONFIG, "-z"), "unknown option -z"),
    (("-c", CONFIG, "--limit-batches", "2"), "unknown option --limit-batches; flags of the training script go behind --"),
    (("-c", CONFIG, "nope"), "unexpected argument 'nope'"),
    (("-c",), "-c needs a value"),
    (("-c", CONFIG, "-g", "two"), "-g 'two': expected a number"),
    (("-c", CONFIG, "-m", "0"), "-m 0: expected 1 or more"),
    (("-c", CONFIG, "-m", "2", "--node"), "--node 0 to 1"),
    (("-c", CONFIG, "-r", "yes"), "-r 'yes': expected true or false"),
    (("-c", CONFIG, "-n", ""), "must not be empty"),
])
def test_refusals_come_before_any_work(repository, words, message):
    refused(launch(repository, *words), message)
    assert not (repository / "pip.log").exists() and not (repository / "exp").exists()


def test_help(repository):
    done = launch(repository, "-h")
    assert done.returncode == 0 and all(f"-{letter} " in done.stdout for letter in "pmgdcnwr") and "#!" not in done.stdout
    assert "BASH_VERSION" not in done.stdout


def test_the_training_script_takes_what_train_sh_hands_over(repository, monkeypatch):
    """The real script, stopped by weights that are not there, before it looks for data."""
    words = asked(launch(repository, *ARGUMENTS, "--", "data.root=/nowhere", "--output-dir", str(repository / "run"), gpus=0))
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match="sonata.pth: no such file"):
        train_sonata.main(words[1:])


# -- the ready-made runs -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, tag", READY_MADE.items())
def test_ready_made(repository, script, tag):
    config, run = f"configs/sonata/semseg-sonata-v1m1-{tag}.yaml", f"exp/sonata/semseg-sonata-v1m1-0-base-{tag}"
    weights = "exp/sonata/pretrain-sonata-v1m1-0-base/model/model_last.pth"
    refused(launch(repository, script=script), f"-w {weights}: no such file")
    assert asked(launch(repository, script=script, SONATA_WEIGHTS="sonata.pth", gpus=8)) == [
        "train_sonata.py", config, "--output-dir", run, "--pretrained_path", "sonata.pth"]
    (repository / weights).parent.mkdir(parents=True)
    (repository / weights).touch()
    words = asked(launch(repository, "-g", "8", "-n", "mine", "--", "training.batch_size=8", "--seed", "1", script=script, gpus=8))
    assert words[4:] == ["8", "train_sonata.py", config, "--output-dir", "exp/sonata/mine", "--pretrained_path", weights,
                         "training.batch_size=8", "--seed", "1"]


@pytest.mark.parametrize("words", [(), ("-g", "1"), ("--", "--seed", "1"), ("training.batch_size=8",)])
def test_another_area_of_s3dis(repository, words):
    asked_for = asked(launch(repository, *words, script="s3dis_linear", SONATA_WEIGHTS="sonata.pth", AREA="2"))
    assert asked_for[3] == "exp/sonata/semseg-sonata-v1m1-0-base-3a-s3dis-lin-area2"
    assert asked_for[-3:] == ["data.train=[Area_1,Area_3,Area_4,Area_5,Area_6]", "data.val=Area_2", "data.test=Area_2"]
    config = load_config(ROOT / "configs/sonata/semseg-sonata-v1m1-3a-s3dis-lin.yaml", train_sonata.DEFAULTS, asked_for[-3:])
    assert config.data.train == ["Area_1", "Area_3", "Area_4", "Area_5", "Area_6"] and config.data.test == "Area_2"
    refused(launch(repository, script="s3dis_linear", SONATA_WEIGHTS="sonata.pth", AREA="7"), "AREA='7'")


# -- configs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tag, benchmark, mode, epochs, crop, scenes, steps", [
    ("0a-scannet-lin", "scannet20", "lin", 800, (None, 102_400), 1201, 40_000),
    ("0b-scannet-dec", "scannet20", "dec", 800, (None, 102_400), 1201, 40_000),
    ("0c-scannet-ft", "scannet20", "ft", 800, (None, 102_400), 1201, 40_000),
    ("1a-scannet200-lin", "scannet200", "lin", 800, (None, 102_400), 1201, 40_000),
    ("3a-s3dis-lin", "s3dis", "lin", 3000, (0.6, 204_800), 204, 25_500)])
def test_configs_hold_the_official_values(tag, benchmark, mode, epochs, crop, scenes, steps):
    config = load_config(ROOT / "configs" / "sonata" / f"semseg-sonata-v1m1-{tag}.yaml", train_sonata.DEFAULTS)
    train_sonata.check_config(config)
    assert config.data.benchmark == benchmark and config.model.num_classes == len(BENCHMARKS[benchmark].names)
    assert config.model.mode == mode and config.training.epochs == epochs and config.training.batch_size == 24
    assert config.training.eval_epochs * (scenes * epochs // config.training.eval_epochs // 24) == steps
    assert (config.augmentation.crop_share, config.augmentation.crop_points) == crop
    assert config.data.test_grid_size == (0.01 if benchmark == "s3dis" else None)
    assert config.optimizer == {"lr": 0.002, "block_lr": 0.0002, "weight_decay": 0.02} and config.training.clip_grad == 3
    assert config.scheduler == {"pct_start": 0.05, "div_factor": 10, "final_div_factor": 1000}
    assert config.training.use_pretrained and not config.model.frozen_eval and config.evaluation.precise
    own = {key: value for key, value in config.augmentation.items() if not key.startswith("crop_")}
    official = {key: getattr(value, "default", value) for key, value in train_sonata.DEFAULTS["augmentation"].items()}
    assert own == {key: official[key] for key in own}
    if benchmark == "s3dis":
        areas = {f"Area_{k}" for k in range(1, 7)}
        assert config.data.val == config.data.test == "Area_5" and set(config.data.train) == areas - {"Area_5"}


# -- 6-fold ------------------------------------------------------------------------------------------------------------

def write_folds(folder, matrices, **changes):
    """metrics.json of each area as evaluate.py writes them; changes: {area number: {key: value}}."""
    paths = []
    for k, matrix in enumerate(matrices, 1):
        record = {"sha256": f"hash {k}", "data": "test split", "confusion_matrix": matrix.tolist(),
                  "per_class": {f"class {c}": {} for c in range(len(matrix))},
                  "config": {"data": {"train": [f"Area_{other}" for other in range(1, 7) if other != k], "val": f"Area_{k}",
                                      "test": f"Area_{k}"},
                             "model": {"mode": "lin"}, "evaluation": {"precise": True}}}
        for key, value in changes.get(f"area_{k}", {}).items():
            place = record
            *parents, last = key.split(".")
            for parent in parents:
                place = place[parent]
            place[last] = value
        paths.append(folder / f"{k}.json")
        paths[-1].write_text(json.dumps(record))
    return [str(path) for path in paths]


def test_six_folds_equal_pointcept(tmp_path, capsys):
    golden = torch.load(ROOT / "tests" / "golden" / "sonata" / "metrics.pt", weights_only=True)
    expected, matrices = golden["output"]["six_fold"], []
    for area in golden["input"]["areas"]:
        hit, union, truth = (area[key].numpy() for key in ("intersection", "union", "target"))
        matrix = np.zeros((14, 14), np.int64)                   # a 14th class takes what the recorded 13 do not tell
        matrix[range(13), range(13)], matrix[:13, 13], matrix[13, :13] = hit, truth - hit, union - truth
        matrices.append(matrix)
    pooled = s3dis_6fold.main(write_folds(tmp_path, matrices)[::-1])
    np.testing.assert_allclose(pooled["iou"][:13], expected["iou"], atol=1e-6)
    np.testing.assert_allclose(pooled["accuracy"][:13], expected["accuracy"], atol=1e-6)
    assert pooled["iou"][:13].mean() == pytest.approx(expected["miou"], abs=1e-6)
    assert abs(pooled["iou"][:13].mean() - expected["mean_of_folds_NOT_the_protocol"]) > 0.1
    assert f"{100 * pooled['iou'][:13].sum() / 14:.2f}" in capsys.readouterr().out.splitlines()[-1]      # the 14th: 0


def test_pooling_is_not_the_mean_of_the_folds(tmp_path, capsys):
    matrices = [np.array([[9, 1, 0], [0, 10, 0], [0, 0, 0]]), np.array([[100, 900, 0], [0, 0, 0], [0, 0, 0]])] + [
        np.diag([1, 1, 0])] * 4
    pooled = s3dis_6fold.main(write_folds(tmp_path, matrices))
    iou = np.array([113 / 1014, 14 / 915, 0])                   # by hand: hits 9 + 100 + 4 of 10 + 1000 + 4, 10 + 4 of 10 + 4 + 901
    np.testing.assert_allclose(np.nan_to_num(pooled["iou"]), iou)
    assert pooled["miou"] == pytest.approx(iou.sum() / 2) and pooled["official_miou"] == pytest.approx(iou.sum() / 3)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("6-fold") and f"mIoU {100 * iou.sum() / 3:.2f}" in last


def test_missing_folds(tmp_path, capsys):
    paths = write_folds(tmp_path, [np.eye(2, dtype=int)] * 6)
    with pytest.raises(ValueError, match="4 of 6 folds: Area_2, Area_5 missing"):
        s3dis_6fold.main([paths[k] for k in (0, 2, 3, 5)])
    assert s3dis_6fold.main([paths[0], "--allow-missing"])["miou"] == 1
    assert "1 of 6 folds" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("area, changes, message", [
    (3, {"config.data.val": "Area_1", "config.data.test": "Area_1", "config.data.train": ["Area_3"]}, "both are of Area_1"),
    (3, {"sha256": "hash 1"}, "both are of the same checkpoint"),
    (3, {"config.data.train": ["Area_1", "Area_3"]}, "scored on Area_3, which is among its training areas"),
    (3, {"limit_batches": 2}, "scored on 2 rooms alone"),
    (3, {"config.data.test": "val"}, "scored on val, expected one of Area_1"),
    (3, {"data": "datasets/s3dis/Area_4"}, "which is among its training areas"),
    (2, {"config.evaluation.precise": False}, "other model or evaluation settings"),
    (2, {"per_class": {"a": {}, "b": {}, "c": {}}, "confusion_matrix": np.eye(3, dtype=int).tolist()}, r"other classes \(3 and 2\)"),
    (2, {"per_class": {"a": {}, "b": {}}}, r"other classes \(2 and 2\)"),
    (2, {"confusion_matrix": [[1, 2]]}, "holds no counts of 2 classes"),
    (2, {"confusion_matrix": [[0, 0], [0, 0]]}, "holds no counts"),
    (2, {"config.data": None}, "not a metrics.json"),
])
def test_folds_that_cannot_be_pooled(tmp_path, area, changes, message):
    paths = write_folds(tmp_path, [np.eye(2, dtype=int)] * 6, **{f"area_{area}": changes})
    with pytest.raises(ValueError, match=message):
        s3dis_6fold.main(paths)


def test_validation_area_counts_where_there_is_no_test_split(tmp_path):
    changes = {f"area_{k}": {"data": "val split", "config.data.test": None, "config.data.val": [f"Area_{k}"]} for k in range(1, 7)}
    assert s3dis_6fold.main(write_folds(tmp_path, [np.eye(2, dtype=int)] * 6, **changes))["miou"] == 1


def test_no_metrics_file(tmp_path, capsys):
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ValueError, match="not a metrics.json"):
        s3dis_6fold.main([str(tmp_path / "no.json")])
    with pytest.raises(FileNotFoundError):
        s3dis_6fold.main([str(tmp_path / "absent.json")])
    with pytest.raises(SystemExit, match="0"):
        s3dis_6fold.main(["--help"])
    assert "NOT the mean of the six folds" in capsys.readouterr().out
