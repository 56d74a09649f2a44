"""What a run leaves, for other programs: each recipe is a function to copy, or a command.

    python tests/recipes.py official out/sit sit.pt         # the EMA, for SiT's or DiT's own sample.py --ckpt
    python tests/recipes.py official out/sit sit.pt sigma   # with the released SiT's 8 channels, four idle
    python tests/recipes.py safetensors out/sit sit.safetensors
    python tests/recipes.py diffusers out/sit vae-for-sit   # the VAE, with the run's normalisation inside

A run is a folder of train_sit.py, or one of its milestones. out/vae/vae is for diffusers as it is. But SiT's,
DiT's and diffusers' own programs know only a factor, x = 0.18215 z, so they draw with the last recipe's VAE
(the normalisation goes into quant_conv and post_quant_conv; SD3's and Flux's VAEs lack them). Samples are
SiT's path (linear, velocity) or DiT's diffusion. Beside diffusers' two files lie in out/vae/vae:

| file | name | shape | |
|---|---|---|---|
| align.safetensors | patch.0.weight, patch.0.bias | [H, C], [H] | of each vector of raw z; GELU follows |
| | patch.2.weight, patch.2.bias | [D, H], [D] | to a patch feature of the teacher |
| | cls.0.weight, cls.0.bias | [H, C], [H] | of the mean of raw z over positions; GELU follows |
| | cls.2.weight, cls.2.bias | [D, H], [D] | to its class feature |
| reals.json | latents: mean, std, min, max | a number | of raw sampled z of 10,000 images |
| | latents: channel_mean, channel_std | [C] | of each channel |
| | latents: n | a number | how many images they were |

C is the latent channels, D the teacher's width, H --align-hidden or D. --align-layers 4 has 0, 2, 4, 6 with
[H, C], [H, H], [H, H], [D, H]; 1 only 0 with [D, C]. --features leaves one of both MLPs out. A checkpoint of
stage 2 holds the statistics, too: info.normalizer.stats.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from sit import SiT
from vae import FACTOR, save, write_safetensors


def official(run, file, sigma=""):
    model = SiT.load(run)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("projectors.")}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias") if sigma else ():
        rows = state[key].unflatten(0, (-1, model.channels))                # [patch * patch, C, ...]
        state[key] = torch.cat([rows, torch.zeros_like(rows)], 1).flatten(0, 1)
    save(state, file)


def safetensors(run, file):
    write_safetensors(SiT.load(run).state_dict(), file)


@torch.no_grad()
def diffusers(run, folder):
    _, vae, norm, _ = sample.load(run)
    C, first, last = vae.z_channels, vae.quant_conv, vae.post_quant_conv
    scale, shift = (torch.as_tensor(v).flatten() / FACTOR for v in (norm.scale, norm.shift))     # [1] or [C]
    first.weight[:C] *= scale.view(-1, 1, 1, 1)
    first.bias[:C] = scale * first.bias[:C] + shift
    first.bias[C:] += 2 * scale.log()                                       # log variances
    last.weight /= scale.view(1, -1, 1, 1)
    last.bias -= last.weight.flatten(1) @ shift.expand(C)
    vae.save(folder)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
