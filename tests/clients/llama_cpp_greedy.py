"""Convert a model for llama.cpp and continue prompts.

    python llama_cpp_greedy.py FOLDER '["prompt", ...]' TOKENS GGUF

The converter knows tokenizers by a hash of what they make of a text, and refuses all others. Ours cut text as GPT-OSS's
does, which the converter calls "gpt-4o"; that name is put in its mouth. `LLAMA_CPP_SOURCE` is the folder of
convert_hf_to_gguf.py: `vendor/llama.cpp` in the source package of llama-cpp-python.
"""

import json
import os
import sys
from itertools import islice

GGML_TYPE_F32 = 0


def convert(folder: str, output: str, kind: str) -> None:
    source = os.environ["LLAMA_CPP_SOURCE"]
    sys.path[:0] = [source, os.path.join(source, "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", kind, "--outfile", output]
    convert_hf_to_gguf.main()


def main() -> None:
    folder, prompts, tokens, output = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    convert(folder, output, sys.argv[5] if len(sys.argv) > 5 else "f32")
    import llama_cpp
    import torch

    model = llama_cpp.Llama(
        output, n_ctx=256, n_threads=1, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False,
        logits_all=True, verbose=False,
    )  # fmt: skip
    found = {"ids": [], "prompts": [], "scores": [], "template": model.metadata.get("tokenizer.chat_template")}
    for prompt in prompts:
        ids = model.tokenize(prompt.encode(), add_bos=False, special=False)
        model.reset()
        model.eval(ids)
        scores = torch.from_numpy(model.scores[: len(ids) - 1].copy()).log_softmax(-1)
        found["scores"].append(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
        model.reset()
        found["prompts"].append(ids)
        found["ids"].append(list(islice(model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0), tokens)))
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
