"""Continue prompts in vLLM.

python vllm_greedy.py FOLDER '["prompt", ...]' TOKENS [DTYPE]
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    dtype = sys.argv[4] if len(sys.argv) > 4 else "float32"
    model = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=len(prompts))
    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    outputs = model.generate(prompts, settings)
    asked = model.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0, max_tokens=1))
    found = {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "scores": [
            [row[i].logprob for row, i in zip(output.outputs[0].logprobs, output.outputs[0].token_ids)]
            for output in outputs
        ],
        "chat": list(asked[0].prompt_token_ids),
        "stops": model.model_config.try_get_generation_config()["eos_token_id"],
    }
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # its workers need not wait for each other
