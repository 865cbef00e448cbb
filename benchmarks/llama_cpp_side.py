"""The half of `benchmarks.serving` that runs where llama.cpp is installed; it knows nothing of this project.

Run as `PYTHON llama_cpp_side.py REQUEST`; REQUEST is a JSON file with the fields of `Request`. In the request's folder
appear `model.gguf` when the checkpoint was converted, and `answer.json` when the engine ran it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, TypedDict


class Request(TypedDict):
    """What is asked for.

    Attributes:
        source: llama.cpp's source tree, with its converter.
        checkpoint: folder of the checkpoint.
        folder: where the files go.
        pre_tokenizer: what the converter is told where it would look the tokenizer up; "" lets it look.
        tokenizer: whether the tokenizer is converted; without it there are ids alone.
        options: more words for the converter.
        ids: token ids of one sequence.
        new_tokens: how many to add greedily.
        text: a text to tokenize; "" for none.
    """

    source: str
    checkpoint: str
    folder: str
    pre_tokenizer: str
    tokenizer: bool
    options: list[str]
    ids: list[int]
    new_tokens: int
    text: str


def convert(request: Request) -> Path:
    """Run the converter's own main on the checkpoint, float32."""
    file = Path(request["folder"], "model.gguf")
    # This file's own folder is on the path too, and has modules of the same names.
    sys.path.insert(0, request["source"])
    script: Any = importlib.import_module("convert_hf_to_gguf")
    base: Any = importlib.import_module("conversion.base")
    if request["pre_tokenizer"]:
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: request["pre_tokenizer"]
    if not request["tokenizer"]:
        hparams = script.ModelBase.load_hparams(Path(request["checkpoint"]), False)
        script.get_model_class(hparams["architectures"][0]).set_vocab = _ids_alone
    sys.argv = [script.__file__, request["checkpoint"], "--outfile", str(file), "--outtype", "f32", *request["options"]]
    script.main()
    return file


def _ids_alone(model: Any) -> None:
    """Say how many ids there are, and nothing of what they mean."""
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


def serve(request: Request, file: Path) -> dict[str, Any]:
    """Logits of every position, the tokens that follow greedily, and the text's tokens; everything in float32."""
    engine: Any = importlib.import_module("llama_cpp")
    context = len(request["ids"]) + request["new_tokens"]
    float32 = {"type_k": engine.GGML_TYPE_F32, "type_v": engine.GGML_TYPE_F32, "flash_attn": False}
    llama = engine.Llama(str(file), n_ctx=context, logits_all=True, n_gpu_layers=0, n_threads=1, **float32)
    llama.eval(request["ids"])
    logits = llama.scores[: llama.n_tokens].tolist()
    tokens: list[int] = []
    for _ in range(request["new_tokens"]):
        tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(tokens[-1:])
    text = llama.tokenize(request["text"].encode(), add_bos=False) if request["text"] else []
    return {"logits": logits, "tokens": tokens, "text": text}


def main() -> None:
    """Answer the request."""
    request: Request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = serve(request, convert(request))
    Path(request["folder"], "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
