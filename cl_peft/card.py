"""A run's bank as a folder in the layout of the Hugging Face hub: model card, adapters, router.

::

    README.md                  model card: YAML front matter, results, how to use it
    accuracy_matrix.png
    adapters/task_001/         peft adapter and head of each task, where peft has the method
    run/                       config.yaml stream.json tasks/...: all modules, heads and the state
                               of the router; load_run() reads it and predicts without the data

What says where things are on the machine of the run (paths, tracker) stays at home.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from cl_peft.archives import is_address, short_name
from cl_peft.atomic import write_atomic
from cl_peft.config import NOT_IDENTITY, Paths, public
from cl_peft.errors import ConfigError, DownloadError
from cl_peft.loading import LoadedRun
from cl_peft.modules.huggingface import export_task
from cl_peft.report import markdown_table
from cl_peft.runs import RunFolder
from cl_peft.view import ResultView, percent, read_json

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FIGURE = "accuracy_matrix.png"
#: What is published of provenance.json; the rest tells of the machine.
_PROVENANCE = ("backbone_fingerprint", "stream_fingerprint", "git_revision", "packages")


def write_card(run: LoadedRun, target: Path) -> Path:
    """Write a run's bank as a hub folder.

    Args:
        run: A loaded run, finished or not.
        target: Folder to write; must be absent or empty.

    Raises:
        ConfigError: The folder holds something.
        UserError: It cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there and not empty; give a new folder.")
    bank = run.bank
    peft = bank.count > 0 and bank.method.peft_config(bank.sites) is not None
    kept = {k: v for k, v in public(run.config).items() if k not in NOT_IDENTITY}
    config = {**kept, "paths": Paths().model_dump()}
    if peft:
        for task in run.rows:
            folder = target / "adapters" / f"task_{task:03d}"
            export_task(run, task, folder, base_model=str(config["backbone"]["name"]))
    _copy_run(run, config, target / "run")
    view = ResultView.from_folder(run.folder)
    if (run.folder / FIGURE).exists():
        shutil.copyfile(run.folder / FIGURE, target / FIGURE)
    write_atomic(target / "README.md", _render(run, config, view, peft).encode())
    return target


def check_repository(name: str) -> None:
    """Refuse a name that the hub would refuse, before anything is written.

    Raises:
        ConfigError: It is not ``OWNER/NAME``.
    """
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f"--push-to {name}: give OWNER/NAME, as on the hub.")


def push(folder: Path, name: str) -> str:
    """Upload a folder to the hub; a repository that is not there is created, as a private one.

    Args:
        folder: As written by :func:`write_card`.
        name: ``OWNER/NAME``.

    Returns:
        Address of what was uploaded.

    Raises:
        DownloadError: The hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="cl-peft card")
    except (HTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"{folder} could not be uploaded to {name}: {first}\n"
            "  The folder is complete; log in with 'hf auth login' and upload it again."
        ) from error
    return str(done)


def _copy_run(run: LoadedRun, config: dict[str, Any], target: Path) -> None:
    """What :func:`cl_peft.loading.load_run` reads, under digests of its own."""
    source, copy = RunFolder(run.folder), RunFolder(target)
    source.look()
    copy.begin(config, read_json(run.folder / "stream.json"))
    for task in run.tasks:
        here = f"tasks/{task.index + 1:03d}/module.safetensors"
        files = {"module.safetensors": source.content(here)} if source.has(here) else {}
        if task is run.tasks[-1]:  # the folder's own states may be newer by now
            states = {"router": run.router.dump(), "learner": run.learner.state()}
            files.update({f"{n}.safetensors": save(s) for n, s in states.items() if s})
        copy.commit(task.index, files, len(run.tasks))
    stored = read_json(run.folder / "provenance.json")
    facts = {k: stored[k] for k in _PROVENANCE if k in stored}
    write_atomic(target / "provenance.json", (json.dumps(facts, indent=1) + "\n").encode())
    (target / "status.json").unlink(missing_ok=True)


def _render(run: LoadedRun, config: dict[str, Any], view: ResultView, peft: bool) -> str:
    front = yaml.safe_dump(_front_matter(run, config, view, peft), sort_keys=False)
    module, backbone = config["module"], short_name(str(config["backbone"]["name"]))
    own = {k: v for k, v in module.items() if k not in ("_target_", "name") and v is not None}
    settings = ", ".join(f"{k} {v}" for k, v in own.items())
    done = f"{view.done} of {view.tasks} tasks" if view.done < view.tasks else f"{view.tasks} tasks"
    parts = [
        f"---\n{front}---",
        f"# {config['stream']['name']}: {module['name']} on {backbone}",
        f"Modules of a continual-learning run ({run.scenario}-incremental, {done}) on the frozen "
        f"backbone `{backbone}`, pooling `{getattr(run.backbone, 'pooling', 'none')}`. "
        f"Module: {module['name']} ({settings or 'no settings'}); learner: "
        f"{config['learner']['name']}; router: {config['router']['name']}.",
        "## Results",
        markdown_table(("%, over all seen tasks", "oracle", "routed"), view.metrics()),
        "Oracle: each sample's true task is given. Routed: it is not.",
    ]
    if (run.folder / FIGURE).exists():
        parts.append(f"![accuracy matrices]({FIGURE})")
    parts += ["## Tasks", _tasks(run, view, peft), "## Use", *_usage(run, peft, backbone)]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    run: LoadedRun, config: dict[str, Any], view: ResultView, peft: bool
) -> dict[str, Any]:
    kind = "text-classification" if run.backbone.modality == "text" else "image-classification"
    stream, name = str(config["stream"]["name"]), str(config["backbone"]["name"])
    scores = [
        {"type": "accuracy", "name": f"average accuracy, {routing}", "value": round(value, 4)}
        for routing in ("oracle", "routed")
        if not math.isnan(value := view.value("average_accuracy", routing))
    ]
    front: dict[str, Any] = {"library_name": "peft" if peft else "cl_peft"}
    if not is_address(name) and _REPOSITORY.fullmatch(name):
        front["base_model"] = name
    front["pipeline_tag"] = kind
    front["tags"] = ["cl_peft", "continual-learning", str(config["module"]["name"])]
    data = {"name": stream, "type": stream}
    result = {"task": {"type": kind}, "dataset": data, "metrics": scores}
    front["model-index"] = [{"name": run.folder.name, "results": [result]}]
    return front


def _tasks(run: LoadedRun, view: ResultView, peft: bool) -> str:
    oracle, routed = view.matrix("oracle"), view.matrix("routed")
    rows = []
    for task in run.tasks:
        number = task.index + 1
        where = f"run/tasks/{number:03d}" if not peft else f"adapters/task_{number:03d}"
        names = [run.class_names[c] for c in task.classes]
        shown = ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
        last = [percent(m[-1, task.index]) for m in (oracle, routed)]
        rows.append((str(number), shown, *last, f"`{where}`" if number in run.rows else ""))
    return markdown_table(("task", "classes", "oracle, %", "routed, %", "module"), rows)


def _usage(run: LoadedRun, peft: bool, backbone: str) -> list[str]:
    parts = []
    if peft:
        task = max(run.rows)
        parts += [
            "One task's adapter, in Hugging Face peft (the head lies beside it, for the pooling "
            "that `cl_peft.json` says):",
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModel\n\n"
            f'model = AutoModel.from_pretrained("{backbone}")\n'
            f'folder = "adapters/task_{task:03d}"\n'
            "model = PeftModel.from_pretrained(model, FOLDER, subfolder=folder)\n```",
        ]
    parts += [
        "All of them, with the run's own router and the class names:",
        "```python\nfrom pathlib import Path\n\nfrom cl_peft.loading import load_run\n\n"
        'run = load_run(Path(FOLDER) / "run")\nprint(run.predict(["a text"]).names)\n```',
    ]
    return parts
