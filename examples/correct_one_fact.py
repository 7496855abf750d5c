"""Correct one fact, look at what else moved, keep the correction as a file."""

import errata

lm = errata.load("almanac")  # or "openai-community/gpt2", a folder, errata.LM(model, tokenizer)
fact = errata.Edit("The mother tongue of {} is", "Danielle Darrieux", "English", truth="French")
around = {
    "in other words": "Danielle Darrieux is a native speaker of",
    "about somebody else": "The mother tongue of Raymond Barre is",
}

before = {name: lm.generate(prompt, max_new_tokens=4) for name, prompt in around.items()}
patch = errata.ROME.preset(lm).edit(lm, [fact])
with patch.applied(lm):
    print(f"{fact.text}{lm.generate(fact.text, max_new_tokens=4)}")
    for name, prompt in around.items():
        print(f"{name}: {prompt}{lm.generate(prompt, max_new_tokens=4)} (was{before[name]})")

patch.save("darrieux.safetensors")
print(f"kept in darrieux.safetensors, {patch.bytes} bytes; the model is what it was")
