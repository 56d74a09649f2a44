"""Stage 1 of ReaLS: fine-tune (or train) a KL autoencoder whose latents align with DINOv2's features (Eq. 1-6, Table 1).

    torchrun --nproc_per_node=8 train_vae.py                # the paper's run: SD-VAE, DINOv2-large-reg, 256 px, 10 epochs
    python train_vae.py --init none --ch 16 --mult 1 2 4 --blocks 1 ...     # a small one on a laptop: see tests/demo.py

It leaves a folder, --out/vae, that diffusers reads, with the alignment MLPs and the latents' statistics beside.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import vae as V
from dino import DINOv2
from fid import LPIPS, psnr


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="imagenet/train", help="folder of images, one subfolder per class")
    p.add_argument("--val", default="imagenet/val", help="folder of images for PSNR and pictures")
    p.add_argument("--size", type=int, default=256, help="side of the training images in pixels")
    p.add_argument("--init", default="sd-vae-ft-ema", help="a public name, a VAE's folder or file, or none: from nothing")
    p.add_argument("--ch", type=int, default=128, help="with --init none: width of the first level")
    p.add_argument("--mult", type=int, nargs="+", default=[1, 2, 4, 4], help="with --init none: widths in units of --ch")
    p.add_argument("--blocks", type=int, default=2, help="with --init none: residual blocks per level")
    p.add_argument("--z-channels", type=int, default=4, help="with --init none: latent channels")
    p.add_argument("--dino", default="vitl14_reg", help="a public name (Table 6: vitb14_reg) or a file in Meta's layout")
    p.add_argument("--features", choices=["both", "patch", "cls", "none"], default="both", help="what is aligned (Table 5)")
    p.add_argument("--align-layers", type=int, default=2, help="Linears in each alignment MLP (Table 7)")
    p.add_argument("--align-hidden", type=int, help="their hidden width; default: DINOv2's")
    p.add_argument("--gan", type=float, default=0.1, help="weight of the PatchGAN term (Eq. 6); 0: no discriminator")
    p.add_argument("--gan-start", type=int, default=2000, help="step at which a fresh discriminator begins to count")
    p.add_argument("--perceptual", type=float, default=1.0, help="weight of LPIPS; 0: no VGG")
    p.add_argument("--vgg", help="VGG16 weights; default: torchvision's, downloaded")
    p.add_argument("--lpips", help="LPIPS linear layers; default: the public ones with the public VGG, none with another")
    p.add_argument("--kl", type=float, default=2e-5, help="weight of KL summed over the latent (Table 10, Figure 5)")
    p.add_argument("--align", type=float, default=1.0, help="weight of the alignment; 0: no DINOv2")
    p.add_argument("--train", choices=["vae", "align"], default="vae", help="align: only the MLPs, on a frozen VAE")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--steps", type=int, help="replaces --epochs")
    p.add_argument("--schedule", choices=["cosine", "constant"], default="cosine")
    p.add_argument("--weight-decay", type=float, default=0.01)
    V.run_flags(p, out="out/vae", batch=64, lr=5e-5)
    args = p.parse_args()
    if args.train == "align":
        args.gan = args.perceptual = args.kl = 0.0
    if args.train == "align" and (args.features == "none" or args.align == 0):
        p.error("--train align trains the alignment MLPs alone: it needs --features and --align")
    if args.features == "none" or args.align == 0:
        args.features, args.align = "none", 0.0
    return args


# -------------------------------------------------------------------------------------------------------- the losses


class PatchGAN(nn.Module):
    """The 70 x 70 patch discriminator (Isola et al. 2017; sizes and init as in taming-transformers): images [B,3,H,W] ->
    logits [B,1,h,w], 30 x 30 at 256 px. Its batch norms see the images of one call."""

    def __init__(self, ch=64):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            layers += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for m in self.main:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x)


def hinge(real, fake):
    """The discriminator's hinge loss over its logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def align_loss(ours, theirs):
    """Eq. 2: 0.9 (1 - cosine) + 0.1 smooth L1, means over all vectors and elements; features [...,D]."""
    cosine = 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    return 0.9 * cosine + 0.1 * F.smooth_l1_loss(ours, theirs)   # Eq. 2


def total_loss(terms, gan, perceptual, kl, align):
    """Eq. 6 from its raw terms (those whose networks are left out are absent)."""
    zero = 0.0
    pixel = terms.get("mse", zero) + gan * terms.get("gan", zero) + perceptual * terms.get("lpips", zero)   # Eq. 3
    latent = kl * terms.get("kl", zero) + align * terms.get("align", zero)                                  # Eq. 4
    return pixel + latent                                                                                   # Eq. 5, and Eq. 6


class Stage1(nn.Module):
    """All that is trained with Eq. 6, in one forward, so that DDP and torch.compile see one module."""

    def __init__(self, vae, align, frozen):
        super().__init__()
        self.vae, self.align, self.frozen = vae, align, frozen
        vae.requires_grad_(not frozen)

    def forward(self, x, noise):
        """x [B,3,H,W] in [-1,1], noise [B,C,h,w] -> moments [B,2C,h,w], reconstruction, aligned patch and cls features."""
        posterior = self.vae.encode(x)
        z = posterior.sample(noise)
        recon = None if self.frozen else self.vae.decode(z)
        patch, cls = (None, None) if self.align is None else self.align(z)
        return torch.cat([posterior.mean, posterior.logvar], 1), recon, patch, cls


class Losses:
    """The raw terms of Eq. 6 for one micro-batch; the networks that are not trained by it live here."""

    def __init__(self, args, run, dino, lpips, disc, grid):
        self.dino, self.lpips, self.disc, self.grid = dino, lpips, disc, grid
        self.device, self.dtype = run.device, torch.float64 if args.dtype == "fp64" else torch.float32
        self.autocast = lambda: torch.autocast(run.device.type, torch.bfloat16, enabled=args.dtype == "bf16")
        self.wanted = {"patch": args.features in ("patch", "both"), "cls": args.features in ("cls", "both")}   # Table 5

    def targets(self, x):
        """DINOv2's patch [B,hw,D] and cls [B,D] features, one patch for each latent vector (448 px for images of 256)."""
        with torch.no_grad(), self.autocast():
            patch, cls = self.dino.targets(x, self.grid)
        return patch.to(self.dtype), cls.to(self.dtype)

    def __call__(self, model, x, noise):
        """-> ({term: scalar}, reconstruction or None, posterior); x [B,3,H,W] in [-1,1], noise [B,C,h,w]."""
        with self.autocast():
            moments, recon, patch, cls = model(x, noise)
        posterior, terms = V.Gaussian(moments), {}
        if recon is not None:
            recon = recon.to(self.dtype)                    # out of bf16: every loss is counted in float32
            terms["mse"] = F.mse_loss(recon, x)
            terms["kl"] = posterior.kl().mean()
        if self.lpips is not None:
            terms["lpips"] = self.lpips(recon, x).mean()
        if self.disc is not None:
            self.disc.requires_grad_(False)
            terms["gan"] = -self.disc(recon).mean()
            self.disc.requires_grad_(True)
        if patch is not None:
            dino_patch, dino_cls = self.targets(x)
            terms["patch"] = align_loss(patch.to(self.dtype), dino_patch)
            terms["cls"] = align_loss(cls.to(self.dtype), dino_cls)
            terms["align"] = sum(w * terms[k] for k, w in self.wanted.items())
        return terms, recon, posterior


# ---------------------------------------------------------------------------------------------------- data and pictures


class Draws(torch.utils.data.Dataset):
    """A micro-batch with all its random draws, made in the loader's workers: (step, places in the global batch) ->
    uint8 images [B,3,S,S], noise [B,C,h,w], indices of unreadable files (each replaced by the file after it)."""

    def __init__(self, images, shape, args):
        self.images, self.shape, self.batch, self.seed = images, shape, args.batch, args.seed

    def __getitem__(self, work):
        step, places = work
        x, noise, bad = [], [], []
        for place in places:
            image, _, unread = self.images.near(V.order(self.seed, len(self.images), step * self.batch + place))
            bad += unread
            x.append(image.flip(-1) if V.rng(self.seed, "flip", step, place).random() < 0.5 else image)
            noise.append(V.normal(self.shape, self.seed, "noise", step, place))
        return torch.stack(x), torch.stack(noise), bad


@torch.no_grad()
def reconstruct(stage1, x):
    """[B,3,H,W] in [-1,1] -> what the decoder makes of the posterior's mean, and PSNR in dB, mean over the images."""
    y = stage1.vae.decode(stage1.vae.encode(x).mean).clamp(-1, 1)
    return y, psnr((y + 1) / 2, (x + 1) / 2).mean().item()


@torch.no_grad()
def picture(stage1, losses, x, path):
    """A PNG: originals, reconstructions, and in DINOv2's three-colour PCA the aligned latents above DINOv2's own features
    (none where patches are not aligned)."""
    rows = [V.to_uint8(x), V.to_uint8(reconstruct(stage1, x)[0])]
    if stage1.align is not None and losses.wanted["patch"]:
        ours, theirs = stage1.align(stage1.vae.encode(x).mean)[0], losses.targets(x)[0]
        basis = V.pca(theirs)[1]
        for tokens in (ours, theirs):
            colours = V.pca(tokens, basis)[0].transpose(1, 2).unflatten(2, (losses.grid, losses.grid))    # [B, 3, h, w]
            rows.append(V.to_uint8(2 * F.interpolate(colours, x.shape[-2:]) - 1))
    with V.atomic(path) as f:
        V.grid(torch.cat(rows), columns=len(x)).save(f, "PNG")


@torch.no_grad()
def latent_statistics(stage1, losses, images, args, run, bad, n=10000):
    """Statistics of sampled raw latents of n images drawn by the seed (Table 10); unreadable files' indices go into bad."""
    chosen = V.rng(args.seed, "subset").permutation(len(images))[:n][run.rank::run.world]
    bar = run.bar(len(chosen), "latent statistics")

    def latents():
        for at in range(0, len(chosen), 32):
            part = [int(i) for i in chosen[at:at + 32]]
            found = [images.near(i) for i in part]
            bad.extend(i for *_, unread in found for i in unread)
            x = torch.stack([image for image, *_ in found])
            posterior = stage1.vae.encode(V.from_uint8(x).to(losses.device, losses.dtype))
            noise = torch.stack([V.normal(posterior.mean.shape[1:], args.seed, "sample", i) for i in part])
            bar.update(len(part))
            yield posterior.sample(noise.to(posterior.mean))
    return V.statistics(latents(), run)


# --------------------------------------------------------------------------------------------------------------- main


def build(args, run):
    """The networks of a run: VAE, alignment heads, DINOv2, LPIPS, discriminator (None where their weight is 0)."""
    torch.manual_seed(int(V.rng(args.seed, "init").integers(2**31)))
    with run.first():  # all weight files are found (or downloaded) before anything long begins
        net = V.VAE(args.ch, args.mult, args.blocks, args.z_channels) if args.init == "none" else V.VAE.load(args.init)
        dino = DINOv2.load(args.dino) if args.align else None
        lpips = LPIPS.load(args.vgg, args.lpips) if args.perceptual else None
    if args.size % net.f:
        raise ValueError(f"--size {args.size} is not a multiple of {net.f}, this VAE's downsampling factor")
    align = V.Align(net.z_channels, dino.dim, args.align_layers, args.align_hidden) if args.align else None
    disc = PatchGAN() if args.gan else None
    dtype = torch.float64 if args.dtype == "fp64" else torch.float32
    for m in (dino, lpips):
        if m is not None:
            m.to(run.device, dtype).eval().requires_grad_(False)
    stage1 = Stage1(net, align, args.train == "align").to(run.device, dtype).to(memory_format=torch.channels_last)
    return stage1, dino, lpips, None if disc is None else disc.to(run.device, dtype)


def resume(args, run, stage1, disc, optimizers, images):
    """The step to go on from, and the unreadable files met before it; weights and optimisers are filled from --out/ckpt.pt if
    it is there."""
    ckpt = V.checkpoint_of(run, args.out, vars(args), {"data": images.fingerprint})
    if ckpt is None:
        return 0, []
    stage1.load_state_dict(ckpt["model"])
    if disc is not None:
        disc.load_state_dict(ckpt["disc"])
    for optimizer, state in zip(optimizers, ckpt["optimizers"]):
        optimizer.load_state_dict(state)
    return ckpt["step"], ckpt["bad"]


def checkpoint(args, run, step, stage1, disc, optimizers, images, bad):
    """ckpt.pt, from which the run goes on; bad: indices of the images that this process could not read."""
    bad = sorted({i for part in run.all(bad) for i in part})
    if run.main:
        V.save({"step": step, "settings": vars(args), "data": images.fingerprint, "classes": images.classes, "bad": bad,
                "model": stage1.state_dict(), "disc": None if disc is None else disc.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers]}, Path(args.out) / "ckpt.pt")
    run.barrier()


def train_step(args, step, batches, model, disc, losses, optimizers):
    """One update from this process's micro-batches -> {name: scalar tensor}, indices of unreadable files."""
    weights = dict(gan=args.gan if step >= args.gan_start else 0.0, perceptual=args.perceptual, kl=args.kl, align=args.align)
    seen, bad = {}, []
    for micro in range(args.accumulate):
        x, noise, unread = next(batches)
        x = V.from_uint8(x.to(losses.device, non_blocking=True)).to(losses.dtype)
        noise = noise.to(losses.device, losses.dtype, non_blocking=True)
        for net in (model, disc):
            if isinstance(net, DDP):  # gradients travel once, with the last micro-batch
                net.require_backward_grad_sync = micro == args.accumulate - 1
        terms, recon, posterior = losses(model, x, noise)
        loss = total_loss(terms, **weights)
        (loss / args.accumulate).backward()
        if disc is not None:
            real, fake = disc(x), disc(recon.detach())
            terms["disc"] = hinge(real, fake)
            (terms["disc"] / args.accumulate).backward()
            terms |= {"real": real.mean(), "fake": fake.mean()}
        z = posterior.sample(noise).detach()
        terms |= {"loss": loss, "z mean": z.mean(), "z std": z.std(), "posterior std": posterior.std.mean()}
        for k, v in terms.items():
            seen[k] = seen.get(k, 0) + v.detach() / args.accumulate
        bad += unread
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = V.learning_rate(args, step)
    seen |= zip(("grad norm", "disc grad norm"), V.update(list(zip(optimizers, (model, disc))), args.clip, step))
    return seen, bad


def finish(args, run, stage1, losses, images, bad):
    """The folder that stage 2, metrics and other people need, and what to run next."""
    stats = latent_statistics(stage1, losses, images, args, run, bad)
    info = {"steps": args.steps, "size": args.size, "classes": images.classes, "latents": stats, "features": args.features,
            "kl": None if stage1.frozen else args.kl,
            "align": None if stage1.align is None else stage1.align.config,
            "dino": args.dino if args.align else None, "dino_sha256": V.fingerprint(losses.dino) if args.align and run.main else None}
    if run.main:
        stage1.vae.save(Path(args.out) / "vae", stage1.align, info)
    run.barrier()
    left_out = sorted({i for part in run.all(bad) for i in part})
    if left_out:
        run.print(f"{len(left_out)} unreadable files were left out: " + ", ".join(images.paths[i] for i in left_out))
    run.print(f"latents: mean {stats['mean']:.4f}  std {stats['std']:.4f}  min {stats['min']:.3f}  max {stats['max']:.3f}\n"
              f"wrote {args.out}/vae; next:\n"
              f"  python fid.py --vae {args.out} --data {args.val} --size {args.size}      # Tables 2, 8 and 10\n"
              f"  torchrun train_sit.py --vae {args.out} --data {args.data} --size {args.size}")


def main():
    args, run = flags(), V.Run()
    V.settle(args, run)
    images, val = V.Images(args.data, args.size), V.Images(args.val, args.size)
    args.steps = args.steps or args.epochs * (len(images) // args.batch)
    if args.steps < 1:
        raise ValueError(f"--data {args.data}: {len(images)} images are less than one --batch {args.batch}")
    stage1, dino, lpips, disc = build(args, run)
    run.lock(args.out)

    fused = run.device.type == "cuda"
    trained = [p for p in stage1.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(trained, args.lr, args.betas, weight_decay=args.weight_decay, fused=fused)]
    if disc is not None:
        optimizers.append(torch.optim.AdamW(disc.parameters(), args.lr, (0.5, 0.9), weight_decay=0, fused=fused))
    start, bad = resume(args, run, stage1, disc, optimizers, images)
    if start == args.steps and (Path(args.out) / "vae" / "reals.json").is_file():
        return run.print(f"{args.out} is finished")

    losses = Losses(args, run, dino, lpips, disc, args.size // stage1.vae.f)
    if args.compile:
        for net in filter(None, (stage1, dino, lpips, disc)):
            net.compile(dynamic=False)                    # shapes are few and fixed
    model, critic = run.parallel(stage1), run.parallel(disc)
    shape = (stage1.vae.z_channels, losses.grid, losses.grid)
    batches = V.loader(Draws(images, shape, args), run, args, start)
    watched = V.rng(args.seed, "subset", 1).permutation(len(val))[:8]
    watched = V.from_uint8(torch.stack([val.near(int(i))[0] for i in watched])).to(run.device, losses.dtype)

    run.print(f"{len(images):,} images, {sum(p.numel() for p in trained):,} parameters, {args.steps:,} steps of {args.batch}, "
              f"{run.world} process(es), {args.dtype} on {run.device.type}")
    run.catch_stop()
    bar, log = run.bar(args.steps * args.batch, "stage 1", initial=start * args.batch), V.Log(run, args, start)
    for step in range(start, args.steps):
        seen, unread = train_step(args, step, batches, model, critic, losses, optimizers)
        log.add(seen)
        bad += unread
        bar.update(args.batch)
        done, stop = step + 1, run.stopping()
        if done % args.log_every == 0 or done == args.steps:
            log.line(done, lr=V.learning_rate(args, step), PSNR=reconstruct(stage1, watched)[1])
        if run.main and (done % args.picture_every == 0 or done == args.steps):
            picture(stage1, losses, watched, Path(args.out) / "pictures" / f"{done:07d}.png")
        if done % args.save_every == 0 or done == args.steps or stop:
            checkpoint(args, run, done, stage1, disc, optimizers, images, bad)
        if stop:
            run.leave(done)
    bar.close()
    run.heed_stop()
    finish(args, run, stage1, losses, images, bad)


if __name__ == "__main__":
    V.main(main)
