"""Checkpoints of transformers that need not fit in memory, compressed tensor by tensor."""

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from decomp import api
from decomp._util.io import digest, remove_unfinished, replacing, write_atomically
from decomp._util.naming import matches, naming
from decomp._util.optional import needing
from decomp._util.progress import bar
from decomp._util.schema import Value
from decomp.files.shards import DTYPES, Entry, checkpoint_entries, entries_of, write_checkpoint
from decomp.methods import Method, kinds_of, method_for, method_named
from decomp.network import surgery
from decomp.network.eligibility import eligibility
from decomp.network.selection import Selector
from decomp.planning.build import NothingToDecompose
from decomp.planning.choice import Choice, unchanged_choice
from decomp.planning.cost import Cost
from decomp.planning.plan import Plan, read_plan
from decomp.planning.safeguard import safeguard
from decomp.ranks import RULES, Fixed, Rule, SpectralRule, parse_spec

METHOD = "decomp"  # the quantization method of a compressed model in its config.json
MARKED = "decomp_factors"  # the field in the header of a file whose layers are factorized
WORK = ".decomp-unfinished"  # the folder, inside of the output, of layers that are done
COMPANIONS = (".jinja", ".json", ".model", ".py", ".txt")  # endings of files beside the weights
PACKED = "packed: the checkpoint has its matrices under other names, or joined; compress the loaded model instead"
SHARD_BYTES = 5_000_000_000
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Processes:
    """The processes of a launch by torchrun or accelerate: this one is number ``rank`` of ``size``.

    They share nothing but the output folder: a process that is done waits for files.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_launch(cls) -> "Processes":
        """Those that the launcher has set in the environment; else a single one."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """What this process does: the largest that is left goes to the process with the least so far.

        >>> [Processes(rank, 2).share({"a": 5, "b": 3, "c": 2, "d": 1}) for rank in (0, 1)]
        [['a', 'd'], ['b', 'c']]
        """
        loads = [0.0] * self.size
        mine = []
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            rank = loads.index(min(loads))
            loads[rank] += costs[name]
            mine += [name] if rank == self.rank else []
        return mine


def compress_checkpoint(
    folder: str | Path,
    output: str | Path,
    *,
    method: str | Method = "svd",
    ranks: Any = "vbmf",
    layers: Selector = None,
    exclude: Selector = (),
    multiple_of: int = 1,
    min_gain: float | None = None,
    device: str = "cpu",
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> Plan:
    """Compress the checkpoint of a model of transformers without loading the model.

    Tensors are read, decomposed by their weight and written one after the other: memory is needed for the largest
    layer and its factors. A call that was cut off goes on where it was when it is made again with the same
    arguments (globs and names, since functions are other ones in another process). In a launch by
    ``torchrun`` or ``accelerate launch`` the layers are shared out by their estimated cost, m n min(m, n).

    Args:
        folder: with ``config.json`` and weights in files of safetensors.
        output: a folder for :func:`decomp.huggingface.from_pretrained`; made if it does not exist.
        method: as for :func:`decomp.plan`.
        ranks: as for :func:`decomp.plan`, a plan included. A budget of the whole model is not possible: write
            ``decomp.ranks.params(0.5)``, a bound of every layer.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these stay dense.
        multiple_of: ranks that a rule chooses are multiples of it.
        min_gain: the least saving of a layer; see :func:`decomp.plan`.
        device: that decomposes, "cuda" for example.
        max_shard_bytes: largest size of a file of the output.
        progress: show a progress bar; by default where there is a terminal.

    Returns:
        The plan of the compressed model.

    Raises:
        ValueError: the folder holds no such checkpoint, or a quantized or compressed one, or the output holds
            something else.
        NothingToDecompose: no layer would be replaced.
        ImportError: transformers is not installed.
    """
    folder, output = Path(folder), Path(output)
    entries = checkpoint_entries(_with_config(folder))
    asked = Request(method, ranks, layers, exclude, multiple_of, min_gain)
    job = Job.of(folder, entries, asked)
    processes = Processes.of_launch()
    work = _begin(output, job.identity(max_shard_bytes), processes)
    if work is None:
        return _plan_of(output)
    if device == "cuda" and processes.size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    mine = processes.share({name: source.cost for name, source in job.sources.items()})
    for name in bar(progress if processes.rank == 0 else False, "decompose", mine):
        if not job.result(work, name).exists():
            _write_result(job.result(work, name), *job.decomposed(name, torch.device(device)))
    if processes.rank > 0:
        _wait_until(lambda: _is_finished(output))
        return _plan_of(output)
    _wait_until(lambda: all(job.result(work, name).exists() for name in job.sources))
    return _assemble(job, folder, output, work, max_shard_bytes)


@dataclass(frozen=True)
class Request:
    """What was asked for; the arguments of :func:`compress_checkpoint`."""

    method: str | Method
    ranks: Any
    layers: Selector
    exclude: Selector
    multiple_of: int
    min_gain: float | None

    def method_of(self, name: str, module: nn.Module) -> Method:
        """The method of a layer."""
        if isinstance(self.ranks, Plan) and name in self.ranks and self.ranks[name].ranks:
            return self.ranks.method_of(name)
        return method_for(method_named(self.method), module)

    def ranks_of(self, name: str) -> Any:
        """The rule or the ranks of a layer; None if it stays dense."""
        if isinstance(self.ranks, Plan):
            return (self.ranks[name].ranks or None) if name in self.ranks else None
        if isinstance(self.ranks, Mapping):
            return next((each for glob, each in reversed(list(self.ranks.items())) if matches(name, glob)), None)
        return self.ranks

    def rule_of(self, name: str) -> Rule | Fixed | None:
        """The rule that chooses the ranks of a layer, or its fixed ranks."""
        spec = self.ranks_of(name)
        return None if spec is None else parse_spec(spec, RULES)

    def text(self) -> str:
        """What tells this request from others."""
        ranks = self.ranks.to_json() if isinstance(self.ranks, Plan) else repr(self.ranks)
        return repr((repr(self.method), ranks, self.layers, self.exclude, self.multiple_of, self.min_gain))


@dataclass(frozen=True)
class LayerSource:
    """A layer that is decomposed: the module, without values, and its tensors in the checkpoint by attribute."""

    module: nn.Module
    tensors: Mapping[str, tuple[str, Entry]]

    @property
    def cost(self) -> float:
        """Estimated cost of its decomposition: m n min(m, n) of the weight as a matrix."""
        rows, *others = self.tensors["weight"][1].shape
        columns = 1
        for size in others:
            columns *= size
        return float(rows) * columns * min(rows, columns)


@dataclass(frozen=True)
class Job:
    """A checkpoint and what is done to it.

    Args:
        model: on the meta device.
        entries: the tensors of the checkpoint.
        sources: the layers that are decomposed, by name.
        dense: the choices of the others.
        names: of all layers, in the order of the model.
        request: what was asked for.
    """

    model: nn.Module
    entries: Mapping[str, Entry]
    sources: Mapping[str, LayerSource]
    dense: dict[str, Choice]
    names: Sequence[str]
    request: Request

    @classmethod
    def of(cls, folder: Path, entries: Mapping[str, Entry], request: Request) -> "Job":
        """Find the layers of a model and their tensors."""
        model = _on_meta(folder, entries)
        keys = _keys(model, entries)

        def why_not(name: str, module: nn.Module) -> str:
            return request.method_of(name, module).why_not(module)

        named = method_named(request.method)
        own = request.ranks.methods.values() if isinstance(request.ranks, Plan) else ()
        kinds = kinds_of(named, *own)
        found = eligibility(model, kinds, why_not, request.layers, request.exclude, needs_values=False)
        if isinstance(request.ranks, Plan):
            request.ranks.require_fit({name: each.module for name, each in found.items()})
        elif isinstance(request.ranks, Mapping):
            _require_matches(request.ranks, found)
        sources, dense = {}, {}
        for name, each in found.items():
            packed = surgery.unpacker_of(each.module) is not None
            source, reason = None, PACKED if packed else each.reason
            if not reason and request.ranks_of(name) is None:
                reason = "no ranks were given for it"
            if not reason:
                source, reason = _source(name, each.module, keys, entries)
            if source is None:
                dense[name] = unchanged_choice(each.module, reason)
            else:
                sources[name] = source
        if not sources:
            reasons = sorted({choice.reason for choice in dense.values()}) or ["it has no layer"]
            raise NothingToDecompose(f"{str(folder)!r}: no layer can be decomposed: {'; '.join(reasons[:4])}")
        return cls(model, entries, sources, dense, list(found), request)

    def identity(self, max_shard_bytes: int) -> str:
        """What tells this job from others: the files of the checkpoint and what was asked for."""
        files = {entry.path: entry.path.stat() for entry in self.entries.values()}
        seen = sorted((path.name, each.st_size, each.st_mtime_ns) for path, each in files.items())
        return digest(json.dumps([seen, sorted(self.sources), self.request.text(), max_shard_bytes]))

    def result(self, work: Path, name: str) -> Path:
        """The file of a layer that is done."""
        return work / f"{list(self.sources).index(name):06}.safetensors"

    def decomposed(self, name: str, device: torch.device) -> tuple[Choice, dict[str, Tensor]]:
        """Decompose a layer: its choice, and the tensors that take the place of its own."""
        source, request = self.sources[name], self.request
        layer = copy.deepcopy(source.module)
        for attribute, (_, entry) in source.tensors.items():
            layer._parameters[attribute] = nn.Parameter(entry.tensor().to(device), requires_grad=False)
        limits: dict[str, Any] = {"multiple_of": request.multiple_of}
        limits |= {} if request.min_gain is None else {"min_gain": request.min_gain}
        with naming(name):
            rule = request.rule_of(name)
            decided = api.plan(
                layer,
                request.method_of(name, layer),
                replace(rule, pure=True) if isinstance(rule, SpectralRule) else request.ranks_of(name),
                layers=lambda *_: True,
                progress=False,
                **limits,
            )
            if not decided[""].ranks:
                return decided[""], {}
            # Which layers are at risk is only known when all of them are done.
            small = decided.apply(layer, progress=False)
        written = _name_in_file(name, source.tensors["weight"][0].removesuffix(".weight"), self.model)
        state = {f"{written}.{key}": each.cpu().contiguous() for key, each in small.state_dict().items()}
        # The marker: from_pretrained of transformers refuses it where decomp.huggingface is not imported.
        state[f"{written}.weight"] = torch.zeros(1, dtype=next(small.parameters()).dtype)
        return replace(small.decomp_plan[""], at_risk=False), state


def _name_in_file(name: str, key: str, model: nn.Module) -> str:
    """The name of a layer beside the others of the checkpoint, with or without the prefix of the base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return key if key in (name, name.removeprefix(prefix)) else name


def _with_config(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no config.json: it is no checkpoint of transformers")
    stated = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if stated:
        kind = stated.get("quant_method", "an unknown method")
        raise ValueError(
            f"{str(folder)!r} is quantized already, by {kind}: give the checkpoint of the dense model"
        )
    return folder


def class_of(folder: str | Path, **options: Any) -> tuple[Any, Any]:
    """The class of transformers that ``config.json`` names, and the configuration.

    Raises:
        ValueError: it names none, or one that transformers does not have.
        ImportError: transformers is not installed.
    """
    with needing("transformers", "a checkpoint of transformers needs transformers: pip install transformers"):
        import transformers
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    name = (config.architectures or [""])[0]
    if not name:
        raise ValueError(f"{str(folder)!r}: its config.json names no class in architectures")
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"{str(folder)!r}: transformers has no class {name!r}: call from_pretrained of yours")
    return kind, config


def _on_meta(folder: Path, entries: Mapping[str, Entry]) -> nn.Module:
    """The model of a folder on the meta device, in the dtype of its checkpoint."""
    kind, config = class_of(folder)
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    dtype = DTYPES.get(max(sizes, key=lambda each: sizes[each]), torch.float32)
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model.to(dtype) if dtype.is_floating_point else model


def _source(
    name: str, module: nn.Module, keys: Mapping[str, str], entries: Mapping[str, Entry]
) -> tuple[LayerSource | None, str]:
    """The tensors of a layer, or why they cannot be decomposed."""
    tensors = {}
    for attribute, parameter in module.named_parameters(recurse=False):
        key = keys.get(f"{name}.{attribute}", "")
        entry = entries.get(key)
        if entry is None or entry.shape != tuple(parameter.shape):
            return None, f"the checkpoint has no tensor of the name and shape of its {attribute}"
        if entry.dtype not in ("F64", "F32", "F16", "BF16"):
            return None, f"its {attribute} is of dtype {entry.dtype}: quantized"
        tensors[attribute] = (key, entry)
    return LayerSource(module, tensors), ""


def _keys(model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, str]:
    """The name in the checkpoint of each tensor of a model, where it stands there alone, as it is.

    Checkpoints on disk have the names of the version of transformers that wrote them; since version 5 it renames,
    splits and joins what it loads by a table.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before version 5: nothing is renamed but the prefix of the base
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        named = [each for name in model.state_dict() for each in ((name, name), (name, name.removeprefix(prefix)))]
        return {name: key for name, key in reversed(named) if key in entries}
    table = get_model_conversion_mapping(cast(Any, model))
    renamings = [each for each in table if isinstance(each, WeightRenaming)]
    converters = [each for each in table if isinstance(each, WeightConverter)]
    state, keys = model.state_dict(), {}
    for key in entries:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converter is None:
            keys[name] = key
    return keys


def _require_matches(ranks: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for glob in ranks:
        if not any(matches(name, glob) for name in found):
            raise ValueError(f"ranks={{{glob!r}: ...}} matches no layer of the model")


def _begin(output: Path, identity: str, processes: Processes) -> Path | None:
    """Make the folder of layers that are done, or take up that of the same job; None if the output is finished.

    Raises:
        ValueError: the output holds something else, or the work of another job.
    """
    work = output / WORK
    stated = work / "job"
    if processes.rank == 0 and not stated.exists():
        if output.exists() and (not output.is_dir() or any(each.name != WORK for each in output.iterdir())):
            raise ValueError(f"output {str(output)!r} exists and holds something else: write another path")
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(stated, identity.encode())
    _wait_until(lambda: stated.exists() or _is_finished(output))
    try:
        found = stated.read_text()
    except FileNotFoundError:  # the first process has finished in the meantime
        return None
    if found != identity:
        raise ValueError(
            f"output {str(output)!r} holds the unfinished work of another checkpoint, or of other arguments: "
            "write another path, or remove it"
        )
    return work


def _is_finished(output: Path) -> bool:
    return (output / "config.json").is_file() and not (output / WORK).exists()


def _wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does; if that one fails, the launcher ends this one."""
    while not condition():
        time.sleep(POLL_SECONDS)


def _write_result(path: Path, choice: Choice, tensors: Mapping[str, Tensor]) -> None:
    with replacing(path) as temporary:
        metadata = {"choice": json.dumps(asdict(choice))}
        safetensors.torch.save_file(dict(tensors), temporary, metadata)


def _read_choice(path: Path) -> Choice:
    with safetensors.safe_open(path, framework="pt") as opened:
        entries: Any = opened
        return Choice.read(Value.parse(entries.metadata()["choice"]))


def _assemble(job: Job, folder: Path, output: Path, work: Path, max_shard_bytes: int) -> Plan:
    """Write the files of the output from those of the layers, its ``config.json`` last."""
    choices = job.dense | {name: _read_choice(job.result(work, name)) for name in job.sources}
    # The factors are there, for these ranks alone: no candidates for others.
    choices |= safeguard(choices, {name: job.request.rule_of(name) for name in job.sources}, {})
    plan = Plan({name: choices[name] for name in job.names}, Cost(Cost.of(job.model) | {"macs": 0}))
    if not plan.replaced:
        shutil.rmtree(work)
        reasons = sorted({choice.reason for choice in plan.values()})
        raise NothingToDecompose(f"{str(folder)!r}: no layer would be replaced: {'; '.join(reasons[:4])}")
    remove_unfinished(output)
    entries = dict(job.entries)
    for name in plan.replaced:
        for key, _ in job.sources[name].tensors.values():
            del entries[key]
        entries |= entries_of(job.result(work, name))
    write_checkpoint(output, dict(sorted(entries.items())), {"format": "pt", MARKED: "true"}, max_shard_bytes)
    copy_companions(folder, output, but=("config.json",))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": METHOD, "plan": json.loads(plan.to_json())}
    write_atomically(output / "config.json", f"{json.dumps(config, indent=2)}\n".encode())
    done = work.rename(output / f"{WORK}-removed")  # at once: other processes wait for this
    shutil.rmtree(done)
    return plan


def _plan_of(output: Path) -> Plan:
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    return read_plan(Value(config["quantization_config"]["plan"]))


def copy_companions(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Copy what a folder of transformers holds beside weights: tokenizers, processors, configurations.

    Folders inside of it that ``modules.json`` of sentence-transformers names are copied with their weights; others
    that have a ``config.json`` are other models. Files that are in the target already stay as they are.
    """
    modules = source / "modules.json"
    listed = json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []
    parts = {each.get("path") for each in listed} - {""}
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        folder = inner.parts[0] if len(inner.parts) > 1 else ""
        of_others = folder not in parts and bool(folder) and (source / folder / "config.json").exists()
        hidden = any(part.startswith(".") for part in inner.parts)
        if hidden or of_others or not path.is_file() or str(inner) in but or (target / inner).exists():
            continue
        is_companion = path.suffix in COMPANIONS and not path.name.endswith(".index.json")
        if is_companion or folder in parts:
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inner)
