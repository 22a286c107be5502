"""Runs in DeepSparse's environment, started by peers_deepsparse.py: compiles a chain of MatMuls, times it on request."""

import json
import os
import sys
import tempfile
import time

# The engine greets on stdout: answers get a descriptor of their own.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import deepsparse  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def weight(side, form, sparsity, random):
    """[side, side] as MatMul takes it, [in, out]: 2 of 4 along the inputs, or zeros anywhere."""
    dense = random.standard_normal((side, side), dtype=np.float32)
    if form == "2:4":
        groups = dense.reshape(side, side // 4, 4)
        order = np.argsort(np.abs(groups), axis=-1)
        np.put_along_axis(groups, order[..., :2], 0, axis=-1)
    else:
        dense[random.random((side, side), dtype=np.float32) < sparsity] = 0
    return np.ascontiguousarray(dense.T) * np.float32((side * (1 - sparsity)) ** -0.5)


def compile_chain(form, sparsity, side, layers, batch, threads):
    random = np.random.default_rng(0)
    nodes, weights = [], []
    for index in range(layers):
        weights.append(numpy_helper.from_array(weight(side, form, sparsity, random), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"x{index + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, side]) for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "chain.onnx")
        onnx.save(model, path)
        engine = deepsparse.compile_model(path, batch_size=batch, num_cores=threads)
    x = random.standard_normal((batch, side), dtype=np.float32)
    return lambda: engine.run([x], val_inp=False)


def stretch(call, seconds):
    call()
    times = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def answer(value):
    print(json.dumps(value), file=answers, flush=True)


answer(f"DeepSparse {deepsparse.__version__}")
call = None
for line in sys.stdin:
    request = json.loads(line)
    if request.pop("task") == "compile":
        call = None  # the engine before this one goes first
        call = compile_chain(**request)
        call()
        answer(True)
    else:
        answer(stretch(call, request["seconds"]))
