"""Stage 1 of ReaLS: fine-tune (or train) a KL autoencoder whose latents align with DINOv2's features.

    torchrun --nproc_per_node=8 train_vae.py    # the paper's run: SD-VAE, DINOv2-large-reg, 256 px, 10 epochs
    python train_vae.py --init none --ch 16 --mult 1 2 4 --blocks 1 ...           # small: see tests/demo.py

It leaves a folder, OUT/vae, that diffusers reads, with the alignment MLPs and the latents' statistics beside.
"""
import argparse
import functools
import math
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from dino import load_teacher, pca
from fid import LPIPS, psnr
from vae import (
    VAE,
    Align,
    Images,
    Log,
    Stop,
    UserError,
    accumulation_steps,
    add_run_flags,
    count,
    fingerprint,
    from_uint8,
    loader,
    lock,
    micro_batches,
    normal,
    number,
    positive,
    print0,
    progress,
    rank,
    read,
    resume,
    rng,
    run_script,
    save_checkpoint,
    save_picture,
    seed_torch,
    shuffled_index,
    start,
    statistics,
    survive,
    to_uint8,
    world,
    write_safetensors,
)


def flags(ungiven=()):
    """The command line's flags; the `ungiven` ones as if they had been left out."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="imagenet/train", help="folder of images, one subfolder per class")
    p.add_argument("--val", default="imagenet/val", help="folder of images for PSNR and pictures")
    p.add_argument("--size", type=positive, default=256, help="side of the training images in pixels")
    p.add_argument("--init", default="sd-vae-ft-ema", help="a public name, a VAE's folder or file, or none")
    p.add_argument("--ch", type=positive, default=128, help="with --init none: width of the first level")
    p.add_argument("--mult", type=positive, nargs="+", default=[1, 2, 4, 4], help="then: widths in ch")
    p.add_argument("--blocks", type=positive, default=2, help="then: residual blocks per level")
    p.add_argument("--z-channels", type=positive, default=4, help="then: latent channels")
    p.add_argument("--dino", default="vitl14_reg", help="a public name (Table 6: vitb14_reg), file or folder")
    p.add_argument("--features", choices=["both", "patch", "cls", "none"], default="both", help="Table 5")
    p.add_argument("--align-layers", type=positive, default=2, help="Linears in an alignment MLP (Table 7)")
    p.add_argument("--align-hidden", type=positive, help="their hidden width; default: DINOv2's")
    p.add_argument("--gan", type=number(0), default=0.1, help="weight of the PatchGAN term; 0: none")
    p.add_argument("--gan-start", type=count, default=2000, help="step from which the term counts")
    p.add_argument("--perceptual", type=number(0), default=1.0, help="weight of LPIPS; 0: no VGG")
    p.add_argument("--vgg", help="VGG16 weights; default: torchvision's, downloaded")
    p.add_argument("--lpips", help="LPIPS's linear layers; default: the public ones, with the public VGG")
    p.add_argument("--kl", type=number(0), default=2e-5, help="weight of KL, summed over the latent")
    p.add_argument("--align", type=number(0), default=1.0, help="weight of the alignment; 0: no DINOv2")
    p.add_argument("--train", choices=["vae", "align", "decoder"], default="vae",
                   help="align: the MLPs alone; decoder: it alone, as a repair of --init; its latents stay")
    p.add_argument("--epochs", type=positive, default=10)
    p.add_argument("--steps", type=positive, help="replaces --epochs")
    add_run_flags(p, out="out/vae", batch=64, lr=5e-5, schedule="cosine", weight_decay=0.01)
    args = p.parse_args()
    vars(args).update({k: p.get_default(k) for k in ungiven})
    if args.train == "align":                    # the weight of any other term of the VAE belongs here, too
        args.gan = args.perceptual = args.kl = 0.0
    if args.train == "decoder":
        args.kl = args.align = 0.0
    if args.train == "align" and (args.features == "none" or args.align == 0):
        p.error("--train align trains the alignment MLPs alone: it needs --features and --align")
    if args.train == "decoder" and args.init == "none":
        p.error("--train decoder repairs a decoder: --init names its VAE")
    if args.features == "none" or args.align == 0:
        args.features, args.align = "none", 0.0
    return args


# ---------------------------------------------------------------------------------------- networks and losses


class PatchGAN(nn.Module):
    """The 70 x 70 patch discriminator (Isola et al. 2017; sizes and init as in taming-transformers): images
    [B,3,H,W] -> logits [B,1,h,w], 30 x 30 at 256 px. Its batch norms see the images of one call."""

    def __init__(self, ch=64):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            layers.append(nn.Conv2d(a, b, 4, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(b, track_running_stats=False), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for name, p in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.02)       # batch norms' gains around 1

    def forward(self, x):
        return self.main(x)


def align_loss(ours, theirs):
    """Eq. 2: 0.9 (1 - cosine) + 0.1 smooth L1, means over all vectors and elements; features [...,D]."""
    assert ours.shape == theirs.shape
    cosine = 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    return 0.9 * cosine + 0.1 * F.smooth_l1_loss(ours, theirs)   # Eq. 2


class Stage1(nn.Module):
    """All that is trained with Eq. 6, in one forward, so that DDP and torch.compile see one module."""

    def __init__(self, vae, align, trained="vae"):
        super().__init__()
        self.vae, self.align, self.decodes = vae, align, trained != "align"
        vae.requires_grad_(trained == "vae")
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(self.decodes)

    def forward(self, x, noise):
        """x [B,3,H,W] in [-1,1], noise [B,C,h,w] -> posterior, z [B,C,h,w], reconstruction [B,3,H,W] (None if
        the MLPs train alone), aligned features patch [B,hw,D] and cls [B,D] (None if not aligned)."""
        posterior = self.vae.encode(x)
        z = posterior.sample(noise)
        recon = self.vae.decode(z) if self.decodes else None
        patch, cls = (None, None) if self.align is None else self.align(z)
        return posterior, z, recon, patch, cls


def build(args, device, dtype):
    """The networks of a run: VAE with MLPs, teacher, LPIPS, discriminator (None where the weight is 0)."""
    seed_torch(args.seed, "init")
    if args.init == "none":
        vae = VAE(args.ch, args.mult, args.blocks, args.z_channels)
    else:
        vae = VAE.load(args.init)
    teacher = load_teacher(args.dino) if args.align else None
    lpips = LPIPS.load(args.vgg, args.lpips) if args.perceptual else None
    if args.size % vae.f:
        raise UserError(f"--size {args.size} is not a multiple of {vae.f}, this VAE's downsampling factor")
    if args.size < (24 if args.gan else 16 if args.perceptual else 1):
        raise UserError(f"--size {args.size} is too small for --gan (24 at least) or --perceptual (16)")
    align = None
    if teacher is not None:
        align = Align(vae.z_channels, teacher.dim, args.align_layers, args.align_hidden, args.features)
    disc = PatchGAN() if args.gan else None
    stage1 = Stage1(vae, align, args.train).to(memory_format=torch.channels_last).train()
    nets = stage1, teacher, lpips, disc
    for net in filter(None, nets):
        net.to(device, dtype)
        if args.compile:
            net.compile(dynamic=False)                    # shapes are few and fixed
    return nets


# ------------------------------------------------------------------------------------------ data and pictures


class Draws(torch.utils.data.Dataset):
    """An image with all its random draws, made in the loader's workers: [step, place in the global batch] ->
    uint8 image [3,S,S], noise [C,h,w]. Another crop: give it Images of size None, and crop here."""

    def __init__(self, images, shape, args):
        self.images, self.shape, self.batch, self.seed = images, shape, args.batch, args.seed

    def __getitem__(self, key):
        step, place = key
        seed_torch(self.seed, "torch", step, place)         # torchvision's augmentations resume, too
        i = shuffled_index(self.seed, len(self.images), step * self.batch + place)
        image, _ = self.images.first_readable(i)
        if rng(self.seed, "flip", step, place).random() < 0.5:
            image = image.flip(-1)
        return image, normal(self.shape, self.seed, "noise", step, place)


@torch.no_grad()
def reconstruct(vae, x):
    """[B,3,H,W] in [-1,1] -> what the decoder makes of the posterior's mean, and its mean PSNR in dB."""
    y = vae.decode(vae.encode(x).mean).clamp(-1, 1)
    return y, psnr((y + 1) / 2, (x + 1) / 2).mean().item()


@torch.no_grad()
def picture(stage1, x, theirs, path):
    """A PNG: originals, reconstructions, and in the three-color PCA of the teacher's patch features `theirs`
    [B,hw,D] the aligned latents above those features (neither where patches are not aligned)."""
    rows = [to_uint8(x), to_uint8(reconstruct(stage1.vae, x)[0])]
    if theirs is not None:
        mean = stage1.vae.encode(x).mean                                                # [B, C, h, w]
        basis = pca(theirs)[1]
        for tokens in (stage1.align(mean)[0], theirs):
            colors = pca(tokens, basis)[0].transpose(1, 2).unflatten(2, mean.shape[2:])     # [B, 3, h, w]
            rows.append(to_uint8(2 * F.interpolate(colors, x.shape[-2:]) - 1))
    save_picture(torch.cat(rows), path, columns=len(x))


@torch.no_grad()
def sampled_latents(vae, images, seed, device, dtype, n=10000):
    """This rank's share of raw latents [B,C,h,w] of n images drawn by the seed, for statistics (Table 10)."""
    chosen = rng(seed, "subset").permutation(len(images))[:n][rank()::world()]
    bar = progress(len(chosen), "latent statistics")
    for part in torch.from_numpy(chosen).split(32):
        x = torch.stack([images.first_readable(i)[0] for i in part.tolist()])
        posterior = vae.encode(from_uint8(x).to(device, dtype))
        noise = torch.stack([normal(posterior.mean.shape[1:], seed, "sample", i) for i in part.tolist()])
        bar.update(len(part))
        yield posterior.sample(noise.to(posterior.mean))


def finish(args, stage1, teacher, images, device, dtype):
    """The folder that stage 2, metrics and other people need, and what to run next."""
    vae, folder = stage1.vae, Path(args.out, "vae")
    if args.train == "decoder":                  # the latents have stayed, and what is known of them
        info, heads = vae.info, vae.folder and vae.folder / "align.safetensors"
        if rank() == 0 and heads and heads.is_file():
            write_safetensors(read(heads), folder / heads.name)
    else:
        info = {"steps": args.steps, "size": args.size, "classes": images.classes, "features": args.features}
        info["latents"] = stats = statistics(sampled_latents(vae, images, args.seed, device, dtype))
        print0("latents:", *(f" {k} {stats[k]:.4g}" for k in ("mean", "std", "min", "max")))
        info["kl"] = args.kl if stage1.decodes else None
    if teacher is not None:
        info |= {"dino": args.dino, "dino_sha256": fingerprint(teacher)}
    if rank() == 0:
        vae.save(folder, stage1.align, info)
    out, data, val = map(shlex.quote, (args.out, args.data, args.val))
    print0(f"wrote {out}/vae; next:")
    print0(f"  python fid.py --vae {out} --data {val} --size {args.size}   # Tables 2, 8 and 10")
    print0(f"  python train_sit.py --vae {out} --data {data} --size {args.size}")


# --------------------------------------------------------------------------------------------------- training


def schedule(step, args):
    """What to multiply a learning rate by: linear --warmup; with --schedule cosine down to 0 at --steps."""
    scale = min(1, (step + 1) / args.warmup) if args.warmup else 1
    if args.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return scale


def main():
    args = flags()
    device = start(args)
    dtype = torch.float64 if args.dtype == "fp64" else torch.float32        # of weights and losses
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    accumulation = accumulation_steps(args)

    images, val = Images(args.data, args.size), Images(args.val, args.size)
    args.steps = args.steps or args.epochs * (len(images) // args.batch)
    if args.steps < 1:
        raise UserError(f"--data {args.data}: {len(images)} images are less than one --batch {args.batch}")
    stage1, teacher, lpips, disc = build(args, device, dtype)
    side, adamw = args.size // stage1.vae.f, functools.partial(torch.optim.AdamW, fused=device.type == "cuda")
    trained = [p for p in stage1.parameters() if p.requires_grad]
    optimizers = [adamw(trained, args.lr, args.betas, weight_decay=args.weight_decay)]
    parts = {"model": stage1, "optimizer": optimizers[0]}                   # what a checkpoint keeps
    if disc is not None:
        optimizers.append(adamw(disc.parameters(), args.lr, (0.5, 0.9), weight_decay=0))
        parts |= {"disc": disc, "disc optimizer": optimizers[1]}

    rates = [[group["lr"] for group in one.param_groups] for one in optimizers]         # times schedule()

    hashes = {"data": images.fingerprint, "init": fingerprint(stage1.vae) if args.init != "none" else None}
    hashes |= {k: net and fingerprint(net) for k, net in {"teacher": teacher, "lpips": lpips}.items()}
    start_step = resume(args, flags, hashes, parts)["step"]
    if start_step == args.steps and Path(args.out, "vae", "reals.json").is_file():
        return print0(f"{args.out} is finished")

    model = DDP(stage1) if world() > 1 else stage1
    disc_model = DDP(disc) if disc is not None and world() > 1 else disc
    nets = [net for net in (model, disc_model) if net is not None]
    draws = Draws(images, (stage1.vae.z_channels, side, side), args)
    batches = loader(draws, micro_batches(args, start_step), args)
    watched = rng(args.seed, "subset", 1).permutation(len(val))[:8].tolist()
    watched = from_uint8(torch.stack([val.first_readable(i)[0] for i in watched])).to(device, dtype)
    print0(f"{sum(p.numel() for p in trained):,} parameters, {len(images):,} images")
    print0(f"{args.steps:,} steps of {args.batch}, {world()} process(es), {args.dtype} on {device.type}")

    save_run = functools.partial(save_checkpoint, args, parts, {**hashes, "classes": images.classes})
    with lock(args.out), Stop(save_run, start_step) as stop:
        sizes = [p.nbytes * (3 if p.requires_grad else 1) for net in nets for p in net.parameters()]
        log = Log(args, start_step, sum(sizes), sum(p.nbytes for p in stage1.parameters()))
        bar = progress(args.steps * args.batch, "stage 1", done=start_step * args.batch)
        for step in range(start_step, args.steps):
            for k in range(accumulation):
                x, noise = (v.to(device, non_blocking=True) for v in next(batches))
                seed_torch(args.seed, "torch", step, k, rank())             # so dropout resumes
                x, noise = from_uint8(x).to(dtype), noise.to(dtype)         # [B,3,H,W] in [-1,1], [B,C,h,w]
                for net in nets:
                    net.require_backward_grad_sync = k == accumulation - 1  # DDP sums gradients once a step
                with autocast():
                    posterior, z, recon, patch, cls = model(x, noise)
                assert noise.shape == z.shape               # another would be broadcast
                pixel, latent = {}, {}            # name: (weight, 0-d tensor); each is summed and logged
                if recon is not None:
                    recon = recon.to(dtype)
                    pixel["mse"] = 1.0, F.mse_loss(recon, x)
                    latent["kl"] = args.kl, posterior.kl().mean()
                if lpips is not None:
                    pixel["lpips"] = args.perceptual, lpips(recon, x).mean()
                if disc is not None:
                    disc.requires_grad_(False)                              # it does not learn here
                    gan = args.gan if step >= args.gan_start else 0.0
                    # LDM's adaptive weight: times |gradient of mse + lpips| / |of gan| at decoder.conv_out;
                    # a graph that is walked twice wants --no-compile
                    pixel["gan"] = gan, -disc(recon).mean()
                    disc.requires_grad_(True)
                if teacher is not None:
                    with torch.no_grad(), autocast():
                        targets = teacher.targets(x, side)                  # patch [B,hw,D], cls [B,D]
                    for name, ours, target in zip(("patch", "cls"), (patch, cls), targets):
                        if ours is not None:                                # None: not in --features
                            latent[name] = args.align, align_loss(ours.to(dtype), target.to(dtype))
                loss_pixel = sum(weight * value for weight, value in pixel.values())        # Eq. 3
                loss_latent = sum(weight * value for weight, value in latent.values())      # Eq. 4
                loss = loss_pixel + loss_latent                             # Eq. 5, with these weights Eq. 6
                raw = {name: value for name, (_, value) in (pixel | latent).items()}
                raw |= {"z mean": z.mean(), "z std": z.std(), "posterior std": posterior.std.mean()}
                log.add({"loss": loss, **raw}, accumulation)
                (loss / accumulation).backward()
                if disc is not None:
                    real, fake = disc_model(x), disc_model(recon.detach())
                    disc_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())   # hinge
                    log.add({"disc": disc_loss, "real": real.mean(), "fake": fake.mean()}, accumulation)
                    (disc_loss / accumulation).backward()

            norms = [nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf) for net in nets]
            finite, stopping = stop.look(torch.stack([*norms, loss.detach()]).isfinite().all())
            share = schedule(step, args)
            for optimizer, own in zip(optimizers, rates):
                for group, rate in zip(optimizer.param_groups, own):
                    group["lr"] = rate * share
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
            log.add(dict(zip(("grad norm", "disc grad norm"), norms)))

            done = step + 1
            bar.update(args.batch)
            if done % args.log_every == 0 or done == args.steps:
                rate = optimizers[0].param_groups[0]["lr"]
                log.line(done, {"lr": rate, "PSNR": reconstruct(stage1.vae, watched)[1]})
            last = done == args.steps or stopping
            if done % args.save_every == 0 or last:
                save_run(done, last)
            if rank() == 0 and (done % args.picture_every == 0 or done == args.steps):
                with autocast():
                    theirs = teacher.targets(watched, side)[0] if args.features in ("both", "patch") else None
                with survive(f"{args.out}/pictures", last):
                    picture(stage1, watched, theirs, f"{args.out}/pictures/{done:07d}.png")
            stop.heed(done)
        bar.close()
        stop.restore()
        finish(args, stage1, teacher, images, device, dtype)


if __name__ == "__main__":
    run_script(main)
