"""May this model be opened? A static check of the downloaded files, which executes nothing of them.

No pickle is loaded, no graph deserialised, no loader of MLflow called; torch and mlflow are not even imported. What a
format does not need is refused, rather than what is known to be bad: see the modules of this package for what each
format may hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from audit_plugin.errors import IntakeError
from audit_plugin.intake.archive import ZIP_MAGIC, read_archive
from audit_plugin.intake.files import list_files, opened
from audit_plugin.intake.mlmodel import MLMODEL, PICKLE_MODULE, Declaration, read_mlmodel
from audit_plugin.intake.onnx_graph import check_onnx
from audit_plugin.intake.pickles import PICKLE_MAGIC, ForbiddenGlobalError, PickledTensor, leaves, read_torch_archive
from audit_plugin.intake.pt2 import check_pt2, is_pt2
from audit_plugin.intake.refusal import FETCH_AGAIN, LOG_AGAIN, quoted, refusal
from audit_plugin.types import Flavour, Intake, IntakeFinding

__all__ = ["inspect"]

_EXPORTED = "data/model.pt2"
_PICKLED = "data/model.pth"
_PICKLE_INFO = "data/pickle_module_info.txt"
_MODEL_SUFFIXES = (".pt2", ".onnx", ".pt", ".pth", ".safetensors", ".pkl", ".pickle", ".h5", ".keras", ".ort")
_CODE_FOLDER = "code/"


def inspect(folder: Path, *, allow_pickle: bool = False) -> Intake:
    """Check a model's folder: one that MLflow logged (with an ``MLmodel``), or any folder with a single model file.

    Accepted are a ``.pt2`` of torch.export, an ONNX graph (external data inside the folder), and a state_dict of plain
    tensors. The format is decided by the contents, never by the extension.

    Args:
        folder: where the files lie. They must not change until the model is loaded.
        allow_pickle: accept a whole pickled module as flavour ``pickle``, of which nothing was checked; only
            ``model.unpickle.convert_pickle`` may open it.

    Raises:
        IntakeError: for anything else, in one line that says which file, what was found, why it is refused and what to
        do. Among the
            reasons: links, a loader or code of the model's own, pickles (also inside a .pt2), operators, expressions or
            names that torch would evaluate, custom ONNX operators, external data outside the folder, damaged archives.
    """
    try:
        return _inspect(folder, allow_pickle)
    except IntakeError:
        raise
    except (Exception, RecursionError, MemoryError) as error:
        # A file that breaks the check itself is refused like one that fails it; anything else would fail open.
        raise refusal(
            str(folder),
            f"files that the check cannot read ({type(error).__name__})",
            "they may be crafted",
            FETCH_AGAIN,
        ) from error


def _inspect(folder: Path, allow_pickle: bool) -> Intake:
    sizes = list_files(folder)
    for path in sizes:
        if path.startswith(_CODE_FOLDER):
            raise refusal(
                path,
                "code beside the model",
                "MLflow would import it when it loads the model",
                "Log the model without code_paths; a .pt2 or ONNX model needs none.",
            )
    if MLMODEL not in sizes:
        path = _single_model_file(sizes)
        flavour, findings = _check_data(folder, path, sizes, allow_pickle)
        return Intake(flavour, path, None, findings)
    with opened(folder / MLMODEL) as content:
        declaration = read_mlmodel(bytes(content[: 2**20]))
    path = _declared_file(folder, declaration, sizes, allow_pickle)
    flavour, findings = _check_data(folder, path, sizes, allow_pickle and path == _PICKLED)
    expected: set[Flavour] = (
        {"onnx"} if declaration.flavour == "onnx" else {"pickle", "state_dict"} if path == _PICKLED else {"pt2"}
    )
    if flavour not in expected:
        raise refusal(path, f"the format {flavour}", f"MLmodel declares {declaration.flavour}", LOG_AGAIN)
    # MLflow unpickles a model.pth whatever it holds.
    return Intake("pickle" if path == _PICKLED else flavour, path, declaration.signature, declaration.findings + findings)


def _declared_file(folder: Path, declaration: Declaration, sizes: Mapping[str, int], allow_pickle: bool) -> str:
    """The file that MLflow's loader opens; where it could choose between several, none is accepted."""
    if declaration.flavour == "onnx":
        if declaration.data not in sizes or PurePosixPath(declaration.data).name != declaration.data:
            raise refusal(MLMODEL, f"the data {quoted(declaration.data)}", "the folder holds no such file", FETCH_AGAIN)
        return declaration.data
    if declaration.data != "data":
        raise refusal(MLMODEL, f"model_data {quoted(declaration.data)}", "mlflow.pytorch always writes 'data'", LOG_AGAIN)
    present = {path for path in sizes if path.startswith("data/")}
    if present == {_EXPORTED}:
        return _EXPORTED
    if present != {_PICKLED, _PICKLE_INFO}:
        listed = ", ".join(sorted(map(quoted, present))[:5]) or "nothing"
        raise refusal("data/", listed, "exactly model.pt2 belongs there, or MLflow may load another file", LOG_AGAIN)
    if not allow_pickle:
        raise refusal(
            _PICKLED,
            "a whole module in a pickle",
            "loading it runs any code that is in it",
            f"{LOG_AGAIN} Or pass --allow-pickle to convert it in a sandbox, if you trust where it came from.",
        )
    with opened(folder / _PICKLE_INFO) as content:
        named = bytes(content[:200])
    if named.strip() != PICKLE_MODULE.encode():
        raise refusal(
            _PICKLE_INFO,
            quoted(named.decode("ascii", "backslashreplace")),
            f"MLflow imports the module named there, and only {PICKLE_MODULE} is known",
            LOG_AGAIN,
        )
    return _PICKLED


def _single_model_file(sizes: Mapping[str, int]) -> str:
    candidates = [path for path in sizes if PurePosixPath(path).suffix.lower() in _MODEL_SUFFIXES]
    if len(candidates) != 1:
        found = ", ".join(map(quoted, candidates[:5])) or "no model file"
        raise refusal(
            "the folder",
            found,
            "without an MLmodel file it must hold exactly one of .pt2, .onnx, .pt or .pth",
            "Give a folder with the model file alone, or one that mlflow.pytorch.log_model wrote.",
        )
    return candidates[0]


def _check_data(
    folder: Path, path: str, sizes: Mapping[str, int], allow_pickle: bool
) -> tuple[Flavour, tuple[IntakeFinding, ...]]:
    """Recognise the data file by its first bytes and check it as what it is."""
    with opened(folder / path) as content:
        if bytes(content[:4]) == ZIP_MAGIC:
            return _check_archive(path, content, allow_pickle)
        if bytes(content[:1]) == PICKLE_MAGIC:
            if allow_pickle:
                return "pickle", ()
            raise refusal(path, "a bare pickle", "loading it runs any code that is in it", LOG_AGAIN)
        if PurePosixPath(path).suffix.lower() == ".safetensors":
            next_step = "Load it into the model and log a .pt2 with mlflow.pytorch.log_model(model, input_example=...)."
            raise refusal(path, "a safetensors file", "it holds no graph and is not supported", next_step)
        return "onnx", check_onnx(path, content, folder, sizes)


def _check_archive(path: str, content: memoryview, allow_pickle: bool) -> tuple[Flavour, tuple[IntakeFinding, ...]]:
    archive = read_archive(path, content)
    if is_pt2(archive):
        return "pt2", check_pt2(path, archive)
    try:
        value = read_torch_archive(path, archive)
    except ForbiddenGlobalError:
        if allow_pickle:
            return "pickle", ()
        raise
    if not isinstance(value, dict) or not any(isinstance(leaf, PickledTensor) for leaf in leaves(value)):
        raise refusal(
            path,
            "no dict of tensors",
            "a state_dict was expected",
            "Save it with torch.save(model.state_dict(), path).",
        )
    return "state_dict", ()
