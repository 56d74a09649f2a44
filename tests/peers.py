"""What bench.py measures ours against: the way that a user would otherwise take, with the same weights.

Networks and losses of other packages are those packages'; the public SiT's and REPA's ways of training and
sampling are written here from their descriptions (Ma et al. 2024, Yu et al. 2024). A peer of a trainer is
made from the trainer's own networks and first micro-batch: terms(batch) are its losses on the trainer's
draws, which must be equal; step() is its own step, with its own draws.
"""
import copy
import importlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fid
import sit
import train_sit
from vae import Images, UserError, from_uint8, loader


def need(name):
    """A package that the project itself does not need."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"this row needs {name} ({e}): pip install -r tests/requirements.txt") from None


def forever(batches):
    """An endless iterator over a loader."""
    while True:
        yield from batches


# ------------------------------------------------------------------------------------ the public SiT and REPA


class PublicBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        layers = need("timm.layers")
        attention = need("timm.models.vision_transformer").Attention
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = attention(dim, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = layers.Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        a, b, gate1, d, e, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(sit.modulate(self.norm1(x), a, b))
        return x + gate2.unsqueeze(1) * self.mlp(sit.modulate(self.norm2(x), d, e))


class PublicTime(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).to(t.device)
        args = t[:, None].float() * freqs[None]
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


class PublicFinal(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(sit.modulate(self.norm_final(x), shift, scale))


class PublicSiT(nn.Module):
    """The SiT on timm's layers, as the public code builds it, with the weights of one of ours."""

    def __init__(self, ours):
        super().__init__()
        s, dim = ours.settings, ours.settings["dim"]
        self.patch, self.out, self.classes = ours.patch, ours.out_channels, ours.classes
        self.x_embedder = need("timm.layers").PatchEmbed(s["input_size"], ours.patch, ours.channels, dim)
        self.t_embedder = PublicTime(dim)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(ours.classes + 1, dim)})
        self.pos_embed = nn.Parameter(torch.zeros_like(ours.pos_embed), requires_grad=False)
        self.blocks = nn.ModuleList([PublicBlock(dim, s["heads"]) for _ in range(s["depth"])])
        self.final_layer = PublicFinal(dim, ours.patch**2 * self.out)
        self.load_state_dict(ours.state_dict())
        self.to(ours.pos_embed.device)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        side = int(x.shape[1] ** 0.5)
        x = x.reshape(len(x), side, side, self.patch, self.patch, self.out)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(len(x), self.out, side * self.patch, side * self.patch)

    def forward_with_cfg(self, x, t, y, scale):
        """Three channels guided, at all times, on a batch that holds each latent twice."""
        half = x[:len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = torch.split(eps, len(eps) // 2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


@torch.no_grad()
def official_sample(net, z, y, scale, steps, draw=None):
    """The public SiT's SDE sampler: drift and score each ask the network, at all times guided, on each latent
    twice; noise drawn on the CPU. net: a PublicSiT; draw(k): step k's noise, two of [B,C,h,w]."""
    x, y = torch.cat([z, z]), torch.cat([y, torch.full_like(y, net.classes)])
    draw = draw or (lambda k: torch.randn(x.size()).chunk(2))
    times = torch.linspace(0, 0.96, steps)

    def velocity(x, t):
        return net.forward_with_cfg(x, torch.ones(len(x), device=x.device) * t, y, scale)

    def sde_drift(x, t):
        score = (t * velocity(x, t) - x) / (1 - t)
        return velocity(x, t) + (1 - t) * score

    dt = times[1] - times[0]
    for k, t in enumerate(times[:-1].to(z.device)):
        noise = torch.cat(list(draw(k))).to(x)
        x = x + sde_drift(x, t) * dt + torch.sqrt(2 * (1 - t) * dt) * noise
    x = x + sde_drift(x, times[-1].to(z.device)) * 0.04
    return x.chunk(2)[0]


class LatentFiles(Dataset):
    """One .npy of moments for each image and one for its mirror image: [i, flip] -> fp16 [2C,h,w]."""

    def __init__(self, cache, folder, n=None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n or len(cache)):
            for flip in range(2):
                file = folder / f"{i:07d}-{flip}.npy"
                if not file.is_file():
                    np.save(file, cache[i, flip].numpy())
        self.labels = cache.labels

    def __getitem__(self, key):
        i, flip = key
        moments = np.load(self.folder / f"{i:07d}-{flip}.npy")
        return torch.from_numpy(moments), torch.tensor(int(self.labels[i]))


class DiffusionWay:
    """A step of SiT's training code: noise on the device, times on the CPU, AdamW as torch gives it, an EMA
    parameter by parameter, the loss read at every step. With `files`, REPA's: latents from one .npy for each
    image, bf16 autocast on a GPU, gradients clipped to 1, but not REPA's own loss, which ours has not either.
    With `vae` (diffusers'), SiT's own: images, encoded at every step. Else x is given, as it comes."""

    def __init__(self, nets, args, norm, device, files=None, vae=None, images=None):
        self.args, self.vae, self.device, self.norm, self.given = args, vae, device, norm, None
        self.net, self.classes = self.network(nets[0]), nets[0].classes
        self.ema = self.average()
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0)
        self.clip, self.half = files is not None, files is not None and device.type == "cuda"
        how = dict(batch_size=args.batch, num_workers=args.workers, drop_last=True)
        how |= dict(pin_memory=device.type == "cuda")
        if files is not None:
            keys = [(i, int(k)) for k in (0, 1) for i in range(len(files.labels))]
            self.source = forever(DataLoader(files, sampler=keys * args.batch, **how))
        elif vae is not None:
            to_float = [(from_uint8(x), y) for x, y in images]
            self.source = forever(DataLoader(to_float * args.batch, shuffle=True, **how))

    def network(self, ours):
        return PublicSiT(ours).train()

    def average(self):
        return copy.deepcopy(self.net).requires_grad_(False)

    def ask(self, x, t, y):
        return self.net(x, t, y)

    def losses(self, x, y, noise, t):
        s = t.view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            out = self.ask(s * x + (1 - s) * noise, t, y)
        return ((out - (x - noise)) ** 2).mean(dim=(1, 2, 3))

    def sampled(self, moments, noise=None):
        mean, logvar = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * torch.clamp(logvar, -30, 20))
        return self.norm.encode(mean + std * (torch.randn_like(mean) if noise is None else noise))

    def terms(self, batch):
        """Its loss on the trainer's own draws."""
        moments, posterior_noise, noise, u, y, _ = (v.to(self.device) for v in batch)
        self.given = self.sampled(moments, posterior_noise), y
        with torch.no_grad():
            loss = self.losses(*self.given, noise, u.float()).mean()
        return {"loss": loss.item()}

    def batch(self):
        """x [B,C,h,w] and labels, by its own way."""
        if self.vae is None and not self.clip:
            return self.given
        x, y = (v.to(self.device) for v in next(self.source))
        if self.clip:
            return self.sampled(x), y
        with torch.no_grad():
            return self.vae.encode(x).latent_dist.sample().mul_(0.18215), y

    def step(self):
        x, y = self.batch()
        if self.classes:
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.classes, y)
        noise = torch.randn_like(x)
        t = torch.rand(len(x)).to(x)
        loss = self.losses(x, y, noise, t).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.update_ema()
        return loss.item()

    @torch.no_grad()
    def update_ema(self):
        theirs = dict(self.ema.named_parameters())
        for name, p in self.net.named_parameters():
            theirs[name].mul_(self.args.ema).add_(p.data, alpha=1 - self.args.ema)


class DiffusersWay(DiffusionWay):
    """The same step with diffusers' DiT and its EMAModel, from latents in memory. Its time's frequencies are
    set to the public DiT's."""

    def network(self, ours):
        from test_sit import to_diffusers
        s = ours.settings
        net = need("diffusers").DiTTransformer2DModel(
            num_attention_heads=s["heads"], attention_head_dim=s["dim"] // s["heads"], norm_eps=1e-6,
            in_channels=ours.channels, out_channels=ours.out_channels, num_layers=s["depth"],
            sample_size=s["input_size"], patch_size=ours.patch, num_embeds_ada_norm=ours.classes)
        net.load_state_dict(to_diffusers(ours.state_dict(), s["depth"]), strict=False)
        for block in net.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm1.emb.class_embedder.dropout_prob = 0         # the step drops labels, as all of them do
        return net.to(ours.pos_embed.device).train()

    def average(self):
        return need("diffusers.training_utils").EMAModel(self.net.parameters(), decay=self.args.ema)

    def ask(self, x, t, y):
        return self.net(x, timestep=t, class_labels=y).sample

    def update_ema(self):
        self.ema.step(self.net.parameters())


# ---------------------------------------------------------------------------------------------------- stage 1


def diffusers_vae(folder):
    return need("diffusers").AutoencoderKL.from_pretrained(folder)


def public_discriminator(ours):
    """taming-transformers' NLayerDiscriminator, whose batch norms keep running means, too."""
    layers = []
    for layer in ours.main:
        if isinstance(layer, nn.BatchNorm2d):
            theirs = nn.BatchNorm2d(layer.num_features)
            theirs.load_state_dict(layer.state_dict(), strict=False)
            layer = theirs
        layers.append(copy.deepcopy(layer))
    return nn.Sequential(*layers)


def public_lpips(ours):
    """The lpips package with the weights of ours."""
    net = need("lpips").LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    slices = {str(i): f"slice{k + 1}" for k, (a, b) in enumerate(
        ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))) for i in range(a, b)}
    state = ours.features.state_dict()
    net.net.load_state_dict({f"{slices[key.split('.')[0]]}.{key}": v for key, v in state.items()})
    for k, lin in enumerate(net.lins):
        lin.model[-1].weight.data.copy_(ours.lin[f"lin{k}"])
    return net.requires_grad_(False)


def public_dinov2(ours):
    """transformers' DINOv2 with registers, with the weights of ours."""
    from test_dino import hub_names
    made = need("transformers")
    config = made.Dinov2WithRegistersConfig(
        hidden_size=ours.dim, num_hidden_layers=len(ours.blocks), patch_size=ours.patch,
        num_attention_heads=ours.blocks[0].attn.heads, image_size=ours.patch * ours.grid)
    return made.Dinov2WithRegistersModel.from_pretrained(
        None, config=config, state_dict=hub_names(ours)).eval().requires_grad_(False)


class TunedVAE:
    """A step of Eq. 6 around the packages' networks, as one would write it: two AdamW, bf16 autocast on a GPU
    around the large networks."""

    def __init__(self, nets, args, folder, device):
        stage1, teacher, lpips, disc = nets
        self.args, self.device, self.half = args, device, args.dtype == "bf16"
        self.vae, self.align = diffusers_vae(folder).to(device).train(), copy.deepcopy(stage1.align)
        self.teacher, self.lpips = public_dinov2(teacher).to(device), public_lpips(lpips).to(device)
        self.disc, self.registers = public_discriminator(disc).to(device).train(), teacher.registers
        self.side, self.patch = args.size // stage1.vae.f, teacher.patch
        trained = [*self.vae.parameters(), *self.align.parameters()]
        self.optimizers = [torch.optim.AdamW(trained, args.lr, args.betas, weight_decay=args.weight_decay),
                           torch.optim.AdamW(self.disc.parameters(), args.lr, (0.5, 0.9), weight_decay=0)]

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def targets(self, x):
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1)
                     for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = F.interpolate(((x + 1) / 2 - mean) / std, 2 * [self.side * self.patch], mode="bicubic")
        with torch.no_grad(), self.autocast():
            tokens = self.teacher(x).last_hidden_state
        return tokens[:, 1 + self.registers:].float(), tokens[:, 0].float()

    def generator_terms(self, x, noise):
        with self.autocast():
            posterior = self.vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * noise
            recon = self.vae.decode(z).sample
            features = self.align(z)
        recon = recon.float()
        terms = {"mse": F.mse_loss(recon, x), "lpips": self.lpips(recon, x).mean()}
        terms |= {"kl": posterior.kl().mean(), "gan": -self.disc(recon).mean()}
        for name, ours, target in zip(("patch", "cls"), features, self.targets(x)):
            cosine = 1 - F.cosine_similarity(ours.float(), target, dim=-1).mean()
            terms[name] = 0.9 * cosine + 0.1 * F.smooth_l1_loss(ours.float(), target)
        return recon, terms

    def total(self, terms):
        a = self.args
        weights = dict(mse=1, lpips=a.perceptual, kl=a.kl, gan=a.gan, patch=a.align, cls=a.align)
        return sum(weights[name] * value for name, value in terms.items())

    def disc_loss(self, x, recon):
        return 0.5 * (F.relu(1 - self.disc(x)).mean() + F.relu(1 + self.disc(recon.detach())).mean())

    def terms(self, batch):
        """Its losses on the trainer's own draws."""
        x, noise = (v.to(self.device) for v in batch)
        self.x, self.shape = from_uint8(x), noise.shape
        with torch.no_grad():
            recon, terms = self.generator_terms(self.x, noise)
            terms = {"loss": self.total(terms), **terms, "disc": self.disc_loss(self.x, recon)}
        return {name: value.item() for name, value in terms.items()}

    def step(self):
        recon, terms = self.generator_terms(self.x, torch.randn(self.shape, device=self.device))
        self.optimizers[0].zero_grad()
        self.total(terms).backward()
        self.optimizers[0].step()
        self.optimizers[1].zero_grad()
        self.disc_loss(self.x, recon).backward()
        self.optimizers[1].step()


# ------------------------------------------------------------------------------------ photographs and latents


def adm_crop(image, size):
    """guided-diffusion's center crop."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = ((n - size) // 2 for n in array.shape[:2])
    return Image.fromarray(array[y:y + size, x:x + size])


def crop_functions(folder, size):
    """Ours and torchvision's ImageFolder: all pictures of a folder, cropped, as uint8 [N,3,size,size]."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor
    to_tensor = PILToTensor()

    def ours():
        images = Images(folder, size)
        return torch.stack([images[i][0] for i in range(len(images))])

    def theirs():
        images = ImageFolder(str(folder), lambda image: to_tensor(adm_crop(image, size)))
        return torch.stack([images[i][0] for i in range(len(images))])

    return ours, theirs


class Reads(Dataset):
    """Ours as the trainer reads it: (image, flip) -> moments [2C,h,w] and label."""

    def __init__(self, cache):
        self.cache = cache

    def __getitem__(self, key):
        return self.cache[key], int(self.cache.labels[key[0]])


def cache_functions(folder, manifest, files, keys, batch, args):
    """Ours, a memory map, and one .npy for each: the moments of these (image, flip), summed."""
    def ours():
        reads = Reads(train_sit.Cache(folder, manifest))
        batches = loader(reads, [keys[k:k + batch] for k in range(0, len(keys), batch)], args)
        return sum(moments.double().sum() + y.sum() for moments, y in batches).item()

    def theirs():
        batches = DataLoader(files, sampler=keys, batch_size=batch, num_workers=args.workers,
                             pin_memory=torch.cuda.is_available())
        return sum(moments.double().sum() + y.sum() for moments, y in batches).item()

    return ours, theirs


# -------------------------------------------------------------------------------------------------------- FID


def inception_functions(folder, weights, images, device):
    """Ours and torch-fidelity's: from image files to the trace of the features' covariance."""
    from test_fid import calibrated_inception, pictures
    need("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.utils import extract_featuresdict_from_input_id
    folder.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(x).save(folder / f"{i:05d}.png")
    torch.save(calibrated_inception(pictures(12)), weights)
    net = fid.Inception.load(weights).to(device)
    peer = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights)).to(device)

    def ours():
        return fid.measure(net, folder, keep=False, device=device).moments[0][1].trace().item()

    def theirs():
        features = extract_featuresdict_from_input_id(
            1, peer, input1=str(folder), cuda=device.type == "cuda", verbose=False)
        return fid_features_to_statistics(features["2048"])["sigma"].trace()

    return ours, theirs


def our_distance(real, fake, device):
    """Ours, from ready features to their Frechet distance."""
    def moments(features):
        sums = fid.Moments()
        for part in features.split(64):                     # as they come from a network
            sums.add(part.to(device))
        return sums.finish(len(features))

    return fid.frechet(*moments(real), *moments(fake))


def distance_functions(real, fake, device):
    """Ours and torch-fidelity's: from ready features to their Frechet distance."""
    need("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def theirs():
        found = map(fid_features_to_statistics, (real, fake))
        return fid_statistics_to_metric(*found, verbose=False)["frechet_inception_distance"]

    return lambda: our_distance(real, fake, device), theirs
