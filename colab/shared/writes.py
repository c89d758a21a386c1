# %%
from jaxlm import api

lm = api.load(workdir)
if lm.no_lm:
    print(lm.no_lm)
elif lm.family == "bert":
    prompt = PROMPT if "[MASK]" in PROMPT else f"{PROMPT} [MASK]"
    for place in api.fill_mask(lm, [prompt])[0]:
        print(prompt, "\n  ", ", ".join(f"{c.token} {c.probability:.2f}" for c in place))
else:
    ((made,),) = api.generate(lm, [PROMPT], max_new_tokens=min(100, lm.max_len // 2))
    print(PROMPT + made.text if lm.family == "gpt" else made.text)
