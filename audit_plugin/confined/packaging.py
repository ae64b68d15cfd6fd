"""A model file becomes a model folder in MLflow's own format. It asks no server anything."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from onnx.helper import tensor_dtype_to_np_dtype

from audit_plugin.confined.jobs import PackageJob
from audit_plugin.intake import inspect
from audit_plugin.model.guarded import grey_input
from audit_plugin.model.input_spec import input_shape
from audit_plugin.model.load import load_network
from audit_plugin.model.onnx_graph import read_model
from audit_plugin.model.save import example_input
from audit_plugin.types import FloatArray


def package(job: PackageJob, destination: Path) -> None:
    """Write a guard or an ONNX classifier in MLflow's ONNX flavour, a torch graph as ``.pt2``.

    Raises:
        IntakeError, SubjectError: the file cannot be used.
    """
    described = Model(**dict[str, Any](job.described))
    if job.is_guard:
        _save_guard(job, described, destination)
    else:
        _save_classifier(job, described, destination)


def _save_classifier(job: PackageJob, described: Model, destination: Path) -> None:
    intake = inspect(job.folder)
    network = load_network(job.folder / intake.data_path, intake, input_shape=input_shape(job.input_spec))
    example, batch = example_input(network), network.batch_size or -1
    signature = ModelSignature(
        Schema([TensorSpec(example.dtype, (batch, *example.shape[1:]))]),
        Schema([TensorSpec(example.dtype, (batch, network.class_count))]),
    )
    if isinstance(network.program, onnx.ModelProto):
        _save_onnx(network.program, described, signature, example, destination, [f"onnx=={onnx.__version__}"], "==")
        return
    mlflow.pytorch.save_model(
        network.program,
        destination,
        mlflow_model=described,
        signature=signature,
        input_example=example,
        serialization_format="pt2",
        pip_requirements=[f"torch=={importlib.metadata.version('torch').partition('+')[0]}"],
    )


def _save_guard(job: PackageJob, described: Model, destination: Path) -> None:
    """The input has no name in the signature, so that it takes what the guarded model takes; the example is uniformly grey, so
    that no image of the clean set leaves with the guard."""
    (file,) = job.folder.iterdir()
    model, batch = read_model(file), job.batch_size or -1
    example = grey_input(job.input_spec, job.batch_size)
    outputs: list[ColSpec | TensorSpec] = [
        TensorSpec(
            np.dtype(tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)),
            (batch, job.class_count) if index == 0 else (batch,),
            output.name,
        )
        for index, output in enumerate(model.graph.output)
    ]
    inputs: list[ColSpec | TensorSpec] = [TensorSpec(example.dtype, (batch, *example.shape[1:]))]
    _save_onnx(model, described, ModelSignature(Schema(inputs), Schema(outputs)), example, destination, [], ">=")


def _save_onnx(
    model: onnx.ModelProto,
    described: Model,
    signature: ModelSignature,
    example: FloatArray,
    destination: Path,
    requirements: list[str],
    comparison: str,
) -> None:
    """Needs ONNX Runtime without a GPU, which serves everywhere and is released under the same numbers as the other."""
    import onnxruntime

    mlflow.onnx.save_model(
        model,
        destination,
        mlflow_model=described,
        signature=signature,
        input_example=example,
        pip_requirements=[*requirements, f"onnxruntime{comparison}{onnxruntime.__version__}"],
        save_as_external_data=False,
    )
