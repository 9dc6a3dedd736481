"""Convert a model for llama.cpp and continue prompts.

    python llama_cpp_greedy.py FOLDER '["prompt", ...]' TOKENS GGUF [f32|bf16]

The converter knows tokenizers by a hash of what they make of a text, and refuses all others. Ours cut text as GPT-OSS's
does, which the converter calls "gpt-4o"; that name is put in its mouth. `LLAMA_CPP_SOURCE` is the folder of
convert_hf_to_gguf.py: `vendor/llama.cpp` in the source package of llama-cpp-python. xllamacpp is llama.cpp's own server
as a wheel.
"""

import json
import os
import sys


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
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = output, 512, 1, False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    found = {"ids": [], "scores": [], "lengths": []}
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        answer = server.handle_completions(asked)
        chosen = answer["choices"][0]["logprobs"]["content"]
        found["ids"].append([token["id"] for token in chosen])
        found["scores"].append([token["logprob"] for token in chosen])
        found["lengths"].append(answer["usage"]["prompt_tokens"])
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # its threads need not end


if __name__ == "__main__":
    main()
