"""Models that are not ours, for tests: Hugging Face models of golden cases, and ONNX files that its exporter makes."""

from __future__ import annotations

import contextlib
import io
import logging
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from tests.support.goldens import GOLDENS

Change = Callable[[nn.Module], None]


def huggingface(case: str, change: Change | None = None) -> Any:
    """The case's model in transformers, with a change on its weights or modules."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / case, attn_implementation="eager").eval()
    if change is not None:
        change(model)
    return model


class _Flat(nn.Module):
    """Caches as plain tensors, as exporters want them."""

    def __init__(self, model: nn.Module, *, cached: bool) -> None:
        super().__init__()
        self.model, self.cached = model, cached

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        step = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if not self.cached:
            return (self.model(**step, use_cache=False).logits,)
        cache = DynamicCache(config=self.model.config)
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        output = self.model(**step, past_key_values=cache, use_cache=True)
        present = [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]
        return (output.logits, *present)


def export(model: Any, path: Path, *, cached: bool = True, batch: int | None = None, scrambled: bool = True) -> Path:
    """Export with torch.onnx (by tracing, the only exporter that takes less than ten seconds).

    cached: with cache inputs and outputs, called past_k_0 and so on.  batch: a fixed one.  scrambled: no name inside
    the graph says anything.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None)
    heads = heads or (1 if getattr(config, "multi_query", False) else config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    rows, tokens, slots = batch or 2, 3, 5 if cached else 0
    names = [f"past_{part}_{i}" for i in range(config.num_hidden_layers) for part in "kv"] if cached else []
    past = [torch.randn(rows, heads, slots, width, dtype=model.dtype) for _ in names]
    ids = torch.arange(10, 10 + rows * tokens).view(rows, tokens)
    positions = torch.arange(slots, slots + tokens).expand(rows, tokens).contiguous()
    step = {"input_ids": "tokens", "attention_mask": "total", "position_ids": "tokens"}
    axes = {name: {0: "batch", 1: axis} for name, axis in step.items()} | {n: {0: "batch", 2: "past"} for n in names}
    if batch is not None:
        axes = {name: {i: axis for i, axis in of.items() if i} for name, of in axes.items()}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Flat(model, cached=cached).eval(),
            (ids, torch.ones(rows, slots + tokens, dtype=torch.int64), positions, past),
            str(path),
            dynamo=False,
            input_names=[*step, *names],
            output_names=["logits", *[name.replace("past", "new") for name in names]],
            dynamic_axes=axes,
            opset_version=17,
        )
    if scrambled:
        _scramble(path)
    return path


def _scramble(path: Path) -> None:
    model = onnx.load(path)
    graph = model.graph
    kept = {v.name for v in (*graph.input, *graph.output)} | {""}
    inner = [t.name for t in graph.initializer] + [name for node in graph.node for name in node.output]
    new = {name: f"t{i * 7919 % 10007}" for i, name in enumerate(inner) if name not in kept}
    for tensor in graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for i, node in enumerate(graph.node):
        node.name = f"n{i}"
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    del graph.value_info[:]
    onnx.save(model, path)


class ChatGlm(nn.Module):
    """A decoder in the layout of ChatGLM2's own code: sequence first, fused projections, a cache of tuples."""

    def __init__(self, spec: Any, weights: dict[str, Tensor]) -> None:
        super().__init__()
        from transformers import PretrainedConfig

        a, self.spec, self.config = spec.attention, spec, PretrainedConfig()
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(_GlmBlock(spec) for _ in range(spec.layers))
        self.transformer.encoder.final_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm.eps)
        self.transformer.output_layer = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        own = self.state_dict()
        self.load_state_dict({name: tensor for name, tensor in weights.items() if name in own})
        dim = a.head_dim // 2
        self.frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> Any:
        from types import SimpleNamespace

        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.transformer.embedding.word_embeddings(input_ids).transpose(0, 1)
        angles = position_ids.t()[..., None] * self.frequencies
        slots = torch.arange(attention_mask.shape[1])
        now = slots[-input_ids.shape[1] :]
        visible = (slots <= now[:, None]) & attention_mask[:, None].bool()
        past = []
        for i, layer in enumerate(self.transformer.encoder.layers):
            x, pair = layer(x, angles, visible, None if past_key_values is None else past_key_values[i])
            past.append(pair)
        logits = self.transformer.output_layer(self.transformer.encoder.final_layernorm(x)).transpose(0, 1)
        return SimpleNamespace(logits=logits, past_key_values=tuple(past))


class _GlmBlock(nn.Module):
    def __init__(self, spec: Any) -> None:
        super().__init__()
        a, h, ffn = spec.attention, spec.hidden_size, spec.mlp.width
        self.a = a
        self.input_layernorm = nn.RMSNorm(h, eps=spec.norm.eps)
        self.self_attention = nn.Module()
        self.self_attention.query_key_value = nn.Linear(h, spec.qkv_width, bias=a.qkv_bias)
        self.self_attention.dense = nn.Linear(a.heads * a.head_dim, h, bias=a.out_bias)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=spec.norm.eps)
        self.mlp = nn.Module()
        self.mlp.dense_h_to_4h = nn.Linear(h, 2 * ffn, bias=spec.mlp.bias)
        self.mlp.dense_4h_to_h = nn.Linear(ffn, h, bias=spec.mlp.bias)

    def forward(self, x: Tensor, angles: Tensor, visible: Tensor, past: Any) -> tuple[Tensor, Any]:
        a = self.a
        qkv = self.self_attention.query_key_value(self.input_layernorm(x)).unflatten(-1, (-1, a.head_dim))
        query, key, value = qkv.split([a.heads, a.kv_heads, a.kv_heads], 2)
        query, key = _rotated(query, angles), _rotated(key, angles)
        if past is not None:
            key, value = torch.cat((past[0], key)), torch.cat((past[1], value))
        wide = [t.repeat_interleave(a.heads // a.kv_heads, 2).permute(1, 2, 0, 3) for t in (key, value)]
        context = nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), wide[0], wide[1], attn_mask=visible[:, None]
        )
        x = x + self.self_attention.dense(context.permute(2, 0, 1, 3).flatten(2))
        gate, up = self.mlp.dense_h_to_4h(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.mlp.dense_4h_to_h(nn.functional.silu(gate) * up), (key, value)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """The first half of each head, in pairs of neighbours."""
    turned, rest = x.chunk(2, -1)
    real, imaginary = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    pairs = torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), -1)
    return torch.cat((pairs.flatten(-2), rest), -1)


def fused_graph(decoder: Any, path: Path) -> Path:
    """A Qwen2 in the fused operators of ONNX Runtime, as onnxruntime-genai's builder makes it.

    Residual and norm are one node, attention takes lengths instead of a mask, and the last residual is nowhere.
    """
    spec = decoder.spec
    a, weights = spec.attention, {n: p.detach().numpy() for n, p in decoder.named_parameters()}
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []

    def add(op: str, inputs: list[str], outputs: list[str], domain: str = "", **facts: Any) -> str:
        nodes.append(onnx.helper.make_node(op, inputs, outputs, name=f"/{outputs[0]}/{op}", domain=domain, **facts))
        return outputs[0]

    def weight(name: str, value: Any) -> str:
        tensors.append(onnx.numpy_helper.from_array(value.copy(), name))
        return name

    def linear(x: str, name: str, matrix: Any, bias: Any = None) -> str:
        product = add("MatMul", [x, weight(f"{name}.weight", matrix.T)], [f"{name}.product"])
        return product if bias is None else add("Add", [product, weight(f"{name}.bias", bias)], [f"{name}.sum"])

    rope = 1.0 / spec.rope.theta ** (torch.arange(0, spec.rope.dim, 2).double() / spec.rope.dim)
    angles = torch.arange(spec.max_positions).double()[:, None] * rope
    tables = [weight("cos", angles.cos().float().numpy()), weight("sin", angles.sin().float().numpy())]
    weight("one", torch.tensor(1).numpy())
    axis = weight("axis", torch.tensor([1]).numpy())
    length = add("ReduceSum", ["attention_mask", axis], ["lengths"], keepdims=0)
    lengths = add("Cast", [add("Sub", [length, "one"], ["lengths.less"])], ["seqlens_k"], to=onnx.TensorProto.INT32)
    shape = add("Shape", ["attention_mask"], ["mask.shape"])
    total = add("Cast", [add("Gather", [shape, "one"], ["total"])], ["total_sequence"], to=onnx.TensorProto.INT32)
    x = add("Gather", [weight("embed", weights["embed.weight"]), "input_ids"], ["embedding"])
    norms = {"epsilon": spec.norm.eps}
    first = weight("first_norm", weights["blocks.0.attn_norm.weight"])
    normed = add("SimplifiedLayerNormalization", [x, first], ["normed"], axis=-1, stash_type=1, **norms)
    for i in range(spec.layers):
        ours = f"blocks.{i}"
        sizes = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
        parts = zip(
            *(torch.from_numpy(weights[f"{ours}.attn.qkv.{n}"]).split(sizes) for n in ("weight", "bias")), strict=True
        )
        qkv = [linear(normed, f"{i}.{n}", w.numpy(), b.numpy()) for n, (w, b) in zip("qkv", parts, strict=True)]
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        outputs = [f"{i}.attention", *[name.replace("past_key_values", "present") for name in past]]
        facts = {"num_heads": a.heads, "kv_num_heads": a.kv_heads, "do_rotary": 1, "scale": a.scale}
        attended = add("GroupQueryAttention", [*qkv, *past, lengths, total, *tables], outputs, "com.microsoft", **facts)
        out = linear(attended, f"{i}.o", weights[f"{ours}.attn.out.weight"])
        gamma = weight(f"{i}.norm", weights[f"{ours}.mlp_norm.weight"])
        names = [f"{i}.normed", "", "", f"{i}.middle"]
        skip = "SkipSimplifiedLayerNormalization"
        normed, x = add(skip, [x, out, gamma], names, "com.microsoft", **norms), names[3]
        gate, up = (linear(normed, f"{i}.{n}", weights[f"{ours}.mlp.{n}.weight"]) for n in ("gate", "up"))
        act = add("Mul", [gate, add("Sigmoid", [gate], [f"{i}.sigmoid"])], [f"{i}.silu"])
        down = linear(add("Mul", [act, up], [f"{i}.product"]), f"{i}.down", weights[f"{ours}.mlp.out.weight"])
        last = i == spec.layers - 1
        gamma = weight(f"{i}.after", weights["final_norm.weight" if last else f"blocks.{i + 1}.attn_norm.weight"])
        names = [f"{i}.after_norm"] if last else [f"{i}.after_norm", "", "", f"{i}.residual"]
        normed, x = add(skip, [x, down, gamma], names, "com.microsoft", **norms), names[-1]
    add("MatMul", [normed, weight("head", weights["head.weight"].T)], ["logits"])
    floats, ints = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    caches = [f"{{}}.{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "decoder",
        [
            info("input_ids", ints, ["batch", "tokens"]),
            info("attention_mask", ints, ["batch", "total"]),
            *(info(c.format("past_key_values"), floats, ["batch", a.kv_heads, "past", a.head_dim]) for c in caches),
        ],
        [
            info("logits", floats, ["batch", "tokens", spec.vocab_size]),
            *(info(c.format("present"), floats, ["batch", a.kv_heads, "total", a.head_dim]) for c in caches),
        ],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def genai(directory: Path, folder: Path, precision: str) -> Path:
    """The model.onnx that onnxruntime-genai's builder writes for its CPU provider.

    directory: a model in Hugging Face layout.
    precision: fp32, fp16 or int4.  What it prints is dropped.
    """
    options = ["-m", "x", "-i", directory, "-o", folder, "-p", precision, "-e", "cpu", "-c", folder / "cache"]
    logging.disable()
    arguments, sys.argv = sys.argv, ["builder", *map(str, options)]
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    finally:
        logging.disable(logging.NOTSET)
        sys.argv = arguments
    return folder / "model.onnx"
