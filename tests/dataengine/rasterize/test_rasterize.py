"""The compiled rasteriser against the definition, and the definition against the rules and gsplat's own torch code."""

import inspect
import math
import subprocess
import sys

import pytest
import torch

from dataengine.rasterize import rasterization, reference
from dataengine.rasterize.steps import Settings, Splats

NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")
KEYS = {
    "batch_ids", "camera_ids", "gaussian_ids", "radii", "means2d", "depths", "conics", "opacities", "width", "height",
    "tile_size", "tile_width", "tile_height", "n_batches", "n_cameras",
}  # fmt: skip


def look(turn, away=2.0):
    """World to camera: `away` metres from the origin, turned about the vertical."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, 0] = matrix[2, 2] = math.cos(turn)
    matrix[0, 2], matrix[2, 0], matrix[2, 3] = math.sin(turn), -math.sin(turn), away
    return matrix


def draw(n=60, *, size=(37, 21), views=2, batch=(), degree=None, channels=3, per_view=False, seed=0):
    """Gaussians in a box of 1 m and cameras 2 m away, float64, by argument."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    width, height = size
    lead = (*batch, views, n) if per_view else (*batch, n)
    tail = (channels,) if degree is None else ((degree + 1) ** 2, 3)
    intrinsics = torch.tensor([[1.1 * width, 0, width / 2 + 0.3], [0, width, height / 2], [0, 0, 1]]).double()
    return {
        "means": uniform(-0.5, 0.5, *batch, n, 3),
        "quats": torch.randn(*batch, n, 4, generator=generator, dtype=torch.float64),
        "scales": uniform(0.02, 0.12, *batch, n, 3),
        "opacities": uniform(0.05, 1.0, *batch, n),
        "colors": uniform(0, 1, *lead, *tail) if degree is None else uniform(-0.5, 0.5, *lead, *tail),
        "viewmats": torch.stack([look(0.4 * v) for v in range(views)]).expand(*batch, views, 4, 4).clone(),
        "Ks": intrinsics.expand(*batch, views, 3, 3).clone(),
        "width": width,
        "height": height,
    }


def random_like(x, seed):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        x.dtype
    )


def run(scene, implementation, dtype=torch.float64, **options):
    """Colours, alphas and every gradient, that of the projected centres too, of random weights on both."""
    arguments = {k: v.clone().to(dtype) if torch.is_tensor(v) else v for k, v in (scene | options).items()}
    for name, value in arguments.items():
        if torch.is_tensor(value) and name != "Ks":
            value.requires_grad_()
    colors, alphas, meta = rasterization(**arguments, implementation=implementation)
    meta["means2d"].retain_grad()
    ((colors * random_like(colors, 5)).sum() + (alphas * random_like(alphas, 6)).sum()).backward()
    results = {"image": colors.detach(), "alphas": alphas.detach(), "d means2d": meta["means2d"].grad}
    if options.get("absgrad"):
        results["absgrad"] = meta["means2d"].absgrad
    given = {f"d {k}": v.grad for k, v in arguments.items() if torch.is_tensor(v) and v.grad is not None}
    return results | given, meta


def spheres(scene):
    """The same Gaussians as covariances, of which the lower triangle must not count."""
    half = torch.linalg.qr(
        scene["quats"].new_ones(1) * random_like(scene["means"][..., None].expand(-1, -1, 3), 9)
    )[0]
    covars = (half * scene["scales"][..., None, :] ** 2) @ half.mT
    return scene | {"quats": None, "scales": None, "covars": covars.triu() + 7 * covars.tril(-1)}


def with_background(scene, **options):
    shape = (*scene["viewmats"].shape[:-2], scene["colors"].shape[-1])
    return scene | {"backgrounds": random_like(torch.empty(shape, dtype=torch.float64), 4), **options}


CASES = {
    "plain": lambda: draw(),
    "not packed": lambda: draw() | {"packed": False},
    "one view, whole tiles": lambda: draw(40, size=(32, 16), views=1),
    "many tiles": lambda: draw(150, size=(70, 50), views=3) | {"packed": False},
    "batch": lambda: draw(20, batch=(2, 3)) | {"packed": False},
    "packed batch": lambda: draw(20, batch=(2,)),
    "colours per view": lambda: draw(channels=4, per_view=True),
    "one channel": lambda: draw(channels=1),
    "many channels": lambda: with_background(draw(channels=37), absgrad=True),
    "background": lambda: with_background(draw()),
    "depth": lambda: draw() | {"render_mode": "D"},
    "expected depth": lambda: with_background(draw(), render_mode="ED"),
    "colour and depth": lambda: with_background(draw(), render_mode="RGB+D"),
    "colour and expected depth": lambda: with_background(draw(), render_mode="RGB+ED", packed=False),
    "absgrad": lambda: draw() | {"absgrad": True, "packed": False},
    "antialiased": lambda: draw() | {"rasterize_mode": "antialiased"},
    "harmonics 0": lambda: draw(degree=0) | {"sh_degree": 0},
    "harmonics 1 of 3": lambda: draw(degree=3) | {"sh_degree": 1},
    "harmonics 2": lambda: draw(degree=2, batch=(2,)) | {"sh_degree": 2},
    "harmonics 3 per view": lambda: draw(degree=3, per_view=True) | {"sh_degree": 3, "packed": False},
    "covariances": lambda: spheres(draw()),
    "near, far": lambda: draw() | {"near_plane": 1.9, "far_plane": 2.3},
    "close": lambda: draw() | {"viewmats": torch.stack([look(0.0, 0.4), look(0.5, 0.3)])},
    "small ones clipped": lambda: draw() | {"radius_clip": 6.0},
    "no blur": lambda: draw() | {"eps2d": 0.0},
    "opaque": lambda: draw(100) | {"opacities": torch.ones(100, dtype=torch.float64)},
    "one pixel": lambda: draw(size=(1, 1)),
    "one column": lambda: draw(size=(1, 40)),
    "one Gaussian": lambda: draw(1),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case):
    """In float64 to rounding; in float32 to 1e-6 of the image and 1e-5 of the largest gradient."""
    scene = CASES[case]()
    exact, _ = run(scene, "reference")
    for dtype in (torch.float64, torch.float32):
        ours, meta = run(scene, "numba", dtype)
        assert ours.keys() == exact.keys()
        for name, true in exact.items():
            image = name in ("image", "alphas")
            scale = max(1.0, float(true.abs().max()) if true.numel() else 0.0)
            allowed = {torch.float64: 1e-11, torch.float32: 1e-6 if image else 1e-5}[dtype]
            error = float((ours[name].double() - true).abs().max()) if true.numel() else 0.0
            assert ours[name].dtype == dtype
            assert error <= allowed * scale, f"{dtype} {name}: off by {error:.2g}"
        assert meta.keys() >= KEYS


@pytest.mark.parametrize("implementation", ["numba", "reference"])
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_gradients_are_those_of_finite_differences(implementation, mode):
    scene = draw(20, size=(19, 13), degree=1) | {"opacities": torch.full((20,), 0.5, dtype=torch.float64)}
    tensors = [scene[name].requires_grad_() for name in NAMES[:-1]]

    def render(*inputs):
        colors, alphas, _ = rasterization(
            *inputs, scene["Ks"], 19, 13, sh_degree=1, render_mode="RGB+ED", rasterize_mode=mode, eps2d=0.5,
            implementation=implementation,
        )  # fmt: skip
        return colors[..., :3], colors[..., 3:] * alphas

    assert torch.autograd.gradcheck(render, tensors, eps=1e-7, atol=1e-3, rtol=1e-3, fast_mode=True)


def walk(meta, scene, opacities, view, column, row):
    """A pixel by the rules of gsplat, one number at a time."""
    left, color, last = 1.0, torch.zeros(3, dtype=torch.float64), 0
    for g in sorted(range(len(opacities)), key=lambda g: (float(meta["depths"][view, g]), g)):
        if not bool((meta["radii"][view, g] > 0).all()):
            continue
        dx, dy = (meta["means2d"][view, g] - torch.tensor([column + 0.5, row + 0.5])).tolist()
        a, b, c = meta["conics"][view, g].tolist()
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = min(0.999, float(opacities[g]) * math.exp(-sigma))
        if sigma < 0 or alpha < 1 / 255:
            continue
        if left * (1 - alpha) <= 1e-4:
            break
        color, left, last = color + alpha * left * scene["colors"][g], left * (1 - alpha), last + 1
    return color, 1 - left, last


@pytest.mark.parametrize("implementation", ["numba", "reference"])
def test_a_pixel_follows_the_rules_of_gsplat(implementation):
    """Opaque Gaussians one behind the other: pixels end, alphas are cut at .999, equal depths go by index."""
    scene = draw(80, size=(20, 18), views=1)
    scene["opacities"] = 0.7 + 0.4 * scene["opacities"].clamp(max=0.75)
    scene["means"][:, 2] = (scene["means"][:, 2] * 8).round() / 8
    colors, alphas, meta = rasterization(**scene, packed=False, implementation=implementation)
    counts = set()
    for column, row in ((9, 8), (10, 9), (3, 4), (0, 0), (19, 17), (15, 9), (16, 2), (12, 16)):
        color, alpha, count = walk(meta, scene, scene["opacities"], 0, column, row)
        counts.add(count)
        torch.testing.assert_close(colors[0, row, column], color, atol=1e-12, rtol=1e-12)
        assert abs(float(alphas[0, row, column, 0]) - alpha) < 1e-12
    assert len(counts) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype, monkeypatch):
    scene = with_background(
        draw(900, size=(70, 50), degree=2), sh_degree=2, absgrad=True, render_mode="RGB+ED"
    )
    scene["backgrounds"] = scene["backgrounds"][..., :3]
    results = []
    for threads in ("1", "3", "8"):
        monkeypatch.setenv("SPARSE_CORE_THREADS", threads)
        results.append(run(scene, "numba", dtype)[0])
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("implementation", ["numba", "reference"])
def test_packed_and_not_packed_are_one_image_and_two_layouts(implementation):
    scene = draw(50, batch=(2,), views=3) | {"near_plane": 1.8}
    colors, alphas, full = rasterization(**scene, packed=False, implementation=implementation)
    same, _, packed = rasterization(**scene, implementation=implementation)
    assert torch.equal(same, colors)
    assert colors.shape == (2, 3, 21, 37, 3)
    assert alphas.shape == (2, 3, 21, 37, 1)
    assert full["batch_ids"] is full["camera_ids"] is full["gaussian_ids"] is None
    shapes = {"radii": (2,), "means2d": (2,), "depths": (), "conics": (3,), "opacities": ()}
    place = packed["batch_ids"], packed["camera_ids"], packed["gaussian_ids"]
    seen = (full["radii"] > 0).all(-1)
    assert 0 < int(seen.sum()) == len(place[0]) < seen.numel()
    for name, tail in shapes.items():
        assert full[name].shape == (2, 3, 50, *tail)
        assert torch.equal(full[name][place], packed[name])
    counted = {k: full[k] for k in ("width", "height", "tile_width", "tile_height", "n_batches", "n_cameras")}
    assert list(counted.values()) == [37, 21, 3, 2, 2, 3]
    assert full["radii"].dtype == torch.int32
    if implementation == "numba":
        assert full["isect_offsets"].shape == (2, 3, 2, 3)
        assert full["tiles_per_gauss"].shape == (2, 3, 50)
        assert int(full["tiles_per_gauss"].sum()) == len(full["flatten_ids"])


@pytest.mark.parametrize("implementation", ["numba", "reference"])
@pytest.mark.parametrize("packed", [True, False])
def test_nothing_to_see(implementation, packed):
    """No Gaussian, none in front of the camera, or no view: the background, and gradients of 0."""
    for scene in (draw(0), draw(5) | {"near_plane": 50.0}):
        scene = with_background(scene, packed=packed, render_mode="RGB+ED")
        results, _ = run(scene, implementation)
        behind = scene["backgrounds"][:, None, None].expand(-1, 21, 37, -1)
        assert torch.equal(results["image"], torch.cat([behind, torch.zeros_like(behind[..., :1])], -1))
        assert results["alphas"].abs().max() == 0
        assert results["d means"].abs().sum() == 0
    none = draw(5, views=1) | {"viewmats": torch.empty(0, 4, 4).double(), "Ks": torch.empty(0, 3, 3).double()}
    assert rasterization(**none, packed=packed, implementation=implementation)[0].shape == (0, 21, 37, 3)


def test_a_long_thin_gaussian_is_drawn_to_its_ends():
    """The determinant of its conic is lost in products of float32; the box around its pixels must not be."""
    numba = pytest.importorskip("dataengine.rasterize.numba")
    settings = Settings(
        width=150, height=150, near=0.01, far=1e10, radius_clip=0.0, eps2d=0.3, antialiased=False, absgrad=False,
        mode="RGB", packed=True, tile_size=16,
    )  # fmt: skip
    for turn in (0.1, 0.7854, 1.3):
        along = torch.tensor([math.cos(turn), math.sin(turn)]).double()
        covariance = 200.0**2 * along[:, None] * along + 0.3 * torch.eye(2)
        conic = torch.linalg.inv(covariance)[[0, 0, 1], [0, 1, 1]][None].float()
        splats = Splats(
            torch.tensor([[75.0, 75.0]]), torch.tensor([[700, 700]], dtype=torch.int32), torch.ones(1), conic,
            torch.ones(1), torch.ones(1, 1), torch.tensor([0, 1]),
        )  # fmt: skip
        _, exact, _ = reference.composite(settings, splats, None)
        _, ours, _ = numba.composite(settings, splats, None)
        assert float((exact > 0).sum()) > 400
        assert float((ours - exact).abs().max()) < 3e-3  # a pixel left out would be off by 1 / 255


def test_auto_takes_what_suits_the_dtype():
    scene = draw(5)
    half = {k: v.half() if torch.is_tensor(v) else v for k, v in scene.items()}
    _, _, meta = rasterization(**scene)
    assert "tiles_per_gauss" in meta
    with pytest.raises(
        ValueError, match="^means: expected float32 or float64, got torch.float16; call .float"
    ):
        rasterization(**half)


BAD = {
    "means: expected [.., N, 3], got [60, 2]; one row per Gaussian": {"means": torch.zeros(60, 2)},
    "viewmats: expected [C, 4, 4], got [2, 3, 4]; one world-to-camera matrix per view, batched like means": {
        "viewmats": torch.zeros(2, 3, 4)
    },
    "Ks: expected [2, 3, 3] beside means [60, 3], got [3, 3]; give every Gaussian, or every view, one": {
        "Ks": torch.eye(3)
    },
    "quats: expected [60, 4] beside means [60, 3], got None; give every Gaussian, or every view, one": {
        "quats": None
    },
    "covars: expected [60, 3, 3] beside means [60, 3], got [60, 6]; give every Gaussian, or every view, one": {
        "covars": torch.zeros(60, 6)
    },
    "colors: expected [60, D] or [2, 60, D], got [60]; give colors per Gaussian, or per view and Gaussian": {
        "colors": torch.zeros(60)
    },
    "sh_degree: expected 0 to 1 with 4 coefficients, got 2; a degree takes (degree + 1) ** 2 coefficients, and 3 is the "
    "highest": {"colors": torch.zeros(60, 4, 3), "sh_degree": 2},
    "backgrounds: expected [2, 3], got [3]; one colour per view, without the depth": {
        "backgrounds": torch.zeros(3)
    },
    "scales: expected torch.float64 like means, got torch.float32; use one floating dtype": {
        "scales": torch.ones(60, 3, dtype=torch.float32)
    },
    "width: expected a whole number of pixels, at least 1, got 0; round it": {"width": 0},
    "near_plane: expected 0 < near_plane < far_plane, got 2.0 and 1.0; use metres": {
        "near_plane": 2.0,
        "far_plane": 1.0,
    },
    "eps2d: expected a variance in square pixels, at least 0, got -1.0; gsplat's is 0.3": {"eps2d": -1.0},
    "render_mode: expected one of RGB, D, ED, RGB+D, RGB+ED, got 'depth'; choose one of these": {
        "render_mode": "depth"
    },
    "opacities: expected finite numbers, got 2 NaN or infinite; lower the learning rate or drop those": {
        "opacities": torch.tensor([math.nan, math.inf] + [0.5] * 58)
    },
    "camera_model: expected 'pinhole' without CUDA, got 'fisheye'; undistort the images first or move to CUDA": {
        "camera_model": "fisheye"
    },
    "sparse_grad: expected False without CUDA, got True; use dense gradients or move to CUDA": {
        "sparse_grad": True
    },
    "tile_size: expected 16 without CUDA, got 8; leave it, the image does not depend on it or move to CUDA": {
        "tile_size": 8
    },
    "viewmats_rs: expected None without CUDA, got a tensor [2, 4, 4]; give every time its own viewmats or move to CUDA": {
        "viewmats_rs": torch.zeros(2, 4, 4)
    },
    "rolling_shutter: expected None without CUDA, got top; give every time its own viewmats": {
        "rolling_shutter": "top"
    },
    "implementation: expected auto or one of reference, numba, gsplat, got 'cuda'": {
        "implementation": "cuda"
    },
    "implementation: expected tensors on a CUDA device for gsplat, got cpu; move them or use auto": {
        "implementation": "gsplat"
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_refused_in_one_sentence(sentence):
    changes = BAD[sentence]
    scales = sentence.startswith("scales")
    changes = {k: v.double() if torch.is_tensor(v) and not scales else v for k, v in changes.items()}
    with pytest.raises(ValueError) as caught:
        rasterization(**(draw() | changes))
    assert str(caught.value) == sentence


def test_the_signature_is_that_of_gsplat():
    gsplat = pytest.importorskip("gsplat")
    theirs = inspect.signature(gsplat.rasterization).parameters
    ours = inspect.signature(rasterization).parameters
    assert list(ours) == [*theirs, "implementation"]
    assert {k: v.default for k, v in theirs.items() if k != "rolling_shutter"} == {
        k: v.default for k, v in ours.items() if k not in ("rolling_shutter", "implementation")
    }


def test_projection_and_harmonics_are_those_of_gsplat():
    """Against the torch code that gsplat tests its own kernels with."""
    theirs = pytest.importorskip("gsplat.cuda._torch_impl")
    scene = draw(50, degree=3) | {"viewmats": torch.stack([look(0.0, 0.7), look(0.5, 2.0)])}
    covars, _ = theirs._quat_scale_to_covar_preci(scene["quats"], scene["scales"], compute_preci=False)
    radii, means2d, depths, conics, factors = theirs._fully_fused_projection(
        scene["means"], covars, scene["viewmats"], scene["Ks"], 37, 21, calc_compensations=True
    )
    for implementation in ("numba", "reference"):
        _, _, meta = rasterization(
            **scene, sh_degree=3, packed=False, rasterize_mode="antialiased", implementation=implementation
        )
        seen = (meta["radii"] > 0).all(-1)
        assert seen.sum() > 50
        assert (meta["radii"] <= radii)[seen].all()  # theirs do not look at the opacity
        opaque = scene["opacities"] * factors
        pairs = {"means2d": means2d, "depths": depths, "conics": conics, "opacities": opaque}
        for name, value in pairs.items():
            torch.testing.assert_close(meta[name][seen], value[seen], atol=1e-9, rtol=1e-9)
    near = draw(1, degree=3, views=1) | {"means": torch.tensor([[0.2, -0.1, 0.05]]).double()}
    near |= {"scales": torch.full((1, 3), 5.0).double(), "opacities": torch.ones(1).double()}
    near["colors"] = near["colors"] / 4
    centre = -near["viewmats"][0, :3, :3].T @ near["viewmats"][0, :3, 3]
    sums = theirs._spherical_harmonics(3, near["means"] - centre, near["colors"])
    for implementation in ("numba", "reference"):
        image, alphas, _ = rasterization(**near, sh_degree=3, implementation=implementation)
        color = (image / alphas)[0, 10, 18]
        torch.testing.assert_close(color, (sums + 0.5).clamp(min=0)[0], atol=1e-9, rtol=1e-9)


def test_the_default_strategy_of_gsplat_densifies_on_top():
    gsplat = pytest.importorskip("gsplat")
    scene = {k: v.float() if torch.is_tensor(v) else v for k, v in draw(40).items()}
    params = torch.nn.ParameterDict(
        {
            "means": scene["means"], "quats": scene["quats"], "scales": scene["scales"].log(),
            "opacities": scene["opacities"].clamp(max=0.99).logit(), "colors": scene["colors"],
        }
    )  # fmt: skip
    optimizers = {k: torch.optim.Adam([v], lr=1e-3) for k, v in params.items()}
    strategy = gsplat.DefaultStrategy(refine_start_iter=0, refine_every=2, grow_grad2d=1e-6, absgrad=True)
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state()
    for step in range(1, 6):
        image, _, info = rasterization(
            params["means"], params["quats"], params["scales"].exp(), params["opacities"].sigmoid(), params["colors"],
            scene["viewmats"], scene["Ks"], 37, 21, packed=False, absgrad=True,
        )  # fmt: skip
        strategy.step_pre_backward(params, optimizers, state, step, info)
        (image - 0.5).square().mean().backward()
        strategy.step_post_backward(params, optimizers, state, step, info)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert len(params["means"]) > 80


def test_the_kernels_were_written_against_this_version_of_the_vectors():
    """numba's cache does not see the other file: raise SIMD with its VERSION."""
    ours, vectors = (
        pytest.importorskip(f"{name}.simd") for name in ("dataengine.rasterize", "sparse_core.kernels")
    )
    assert ours.SIMD == vectors.VERSION


def test_importing_pulls_in_no_backend():
    code = "import sys, dataengine.rasterize; print(*({'numba', 'gsplat', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", ["plain", "not packed", "antialiased", "colour and expected depth", "harmonics 2"]
)
def test_gsplat_on_cuda_is_the_definition(case):
    scene = CASES[case]()
    exact, _ = run(scene, "reference")
    cuda = {k: v.cuda() if torch.is_tensor(v) else v for k, v in scene.items()}
    colors, alphas, meta = rasterization(
        **{k: v.float() if torch.is_tensor(v) else v for k, v in cuda.items()}
    )
    assert float((colors.cpu().double() - exact["image"]).abs().max()) < 1e-4
    assert float((alphas.cpu().double() - exact["alphas"]).abs().max()) < 1e-4
    assert meta.keys() >= KEYS
