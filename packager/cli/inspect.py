"""The data of ``packager inspect``, for the table and for --json."""

from __future__ import annotations

from typing import Any

from packager.checkpoint.checkpoint import Checkpoint
from packager.checkpoint.lora import Adapter, check_fit


def inspect(checkpoint: Checkpoint, adapter: Adapter | None = None) -> dict[str, Any]:
    """JSON-ready facts about a checkpoint and the adapter, if given (sizes in bytes).

    Raises InputError when the adapter does not fit.
    """
    shape, tokenizer, origin = checkpoint.shape, checkpoint.tokenizer, checkpoint.origin
    names = ("bos", "eos", "pad", "unk")
    facts: dict[str, Any] = {
        "name": checkpoint.name,
        "origin": {"kind": origin.kind, "id": origin.id, "revision": origin.revision},
        "digest": checkpoint.digest,
        "architecture": checkpoint.architecture,
        "model_type": checkpoint.model_type,
        "kind": checkpoint.family.kind,
        "parameters": checkpoint.parameters,
        "dtype": checkpoint.dtype,
        "weight_bytes": checkpoint.weight_bytes,
        "weight_files": len({tensor.file for tensor in checkpoint.tensors.values()}),
        "tensors": len(checkpoint.tensors),
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate": shape.intermediate,
        "tied_embeddings": shape.tied,
        "context": shape.context,
        "vocabulary": {"embedding_rows": shape.vocab, "tokenizer": tokenizer.vocab_size},
        "tokenizer": {
            "class": tokenizer.tokenizer_class,
            "special_tokens": {
                name: {"token": getattr(tokenizer, name), "id": getattr(tokenizer, f"{name}_id")} for name in names
            },
            "adds_bos": tokenizer.add_bos,
            "stop_ids": list(tokenizer.stop_ids),
            "sampling": dict(tokenizer.sampling),
            "chat_template": tokenizer.chat_template is not None,
            "template_writes_bos": tokenizer.template_writes_bos,
            "template_turn_end": tokenizer.turn_end,
            "agrees": not tokenizer.agreement,
            "agreement": list(tokenizer.agreement),
            "remarks": list(tokenizer.remarks),
            "typed_by_users_become_control_tokens": list(tokenizer.marks),
        },
        "adapter": None,
    }
    if adapter is not None:
        facts["adapter"] = {
            "name": adapter.name,
            "digest": adapter.digest,
            "kind": "DoRA" if adapter.dora else "rsLoRA" if adapter.config.get("use_rslora") else "LoRA",
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": list(adapter.targets),
            "tensors": len(adapter.tensors),
            "bytes": adapter.size,
            "base_model": adapter.base_model,
            "brings": list(adapter.tokenizer_files),
            "notes": list(check_fit(adapter, checkpoint)),
        }
    return facts
