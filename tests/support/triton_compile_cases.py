"""Which Triton kernels are compiled, with which types and constants."""

# Triton's names: element type, and the type it is computed in.
TYPES = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}
# Types of features and weight that head_deviation_loss takes.
PAIRS = [(kind, kind) for kind in TYPES] + [("bf16", "fp32"), ("fp16", "fp32")]

HEAD = ("weight_ptr", "d_weight_ptr", "weight_momentum_ptr")
BIAS = ("bias_ptr", "d_bias_ptr", "bias_momentum_ptr")
# Kernels in which a spilled register would cost more than the work.
NO_SPILLS = (
    "head_deviation_small_rows_kernel",
    "head_deviation_small_weight_kernel",
    "head_deviation_rows_kernel",
    "head_deviation_finish_kernel",
    "inject_kernel",
)


def pointers(names, kind):
    return dict.fromkeys(names, f"*{kind}")


def head_step_cases():
    """A number, and a case; those of a kernel have eight numbers in a row."""
    index = 0
    for element, compute in TYPES.items():
        scalars = pointers(("lr_ptr", "norm_ptr", "weight_scale_ptr"), compute)
        elements = pointers(HEAD + BIAS, element)
        others = {"partials_ptr": f"*{compute}", "found_inf_ptr": "*fp32", "programs": "i32"}
        for flag in (True, False):
            # A count of 2**31 or more arrives as i64.
            types = elements | scalars | others | {"count": "i64" if flag else "i32"}
            types |= {"bias_count": "i32"}
            flags = {"PROJECT": flag, "HAS_FOUND_INF": flag}
            yield (
                index,
                (
                    "head_step_small_kernel",
                    types | {"count": "i32"},
                    {"MOMENTUM": 0.9, "BLOCK": 1024, "BLOCK_BIAS": 16, **flags},
                ),
            )
            yield (
                index,
                (
                    "head_step_update_kernel",
                    types | {"count": "i64"},
                    {"MOMENTUM": 0.9, "BLOCK": 2048, "DEFERRED": flag, "HAS_FOUND_INF": flag},
                ),
            )
            yield (
                index,
                ("head_step_write_kernel", types, {"BLOCK": 2048, "MAX_PROGRAMS": 1024, **flags}),
            )
            yield index, ("head_step_scale_kernel", types, {"MAX_PROGRAMS": 1024, **flags})
            index += 1


def deviation_types(features, weight):
    """The type of every argument of the kernels of head_deviation_loss that has one."""
    compute = TYPES[features]
    of_features = ("features_ptr", "clean_ptr", "d_features_ptr", "d_logits_ptr")
    of_weight = ("weight_ptr", "bias_ptr", "weight0_ptr", "d_weight_ptr", "d_bias_ptr")
    labels = ("labels_ptr", "correct_ptr", "invalid_ptr")
    return (
        {"hits_ptr": "*i32", "overlaps_ptr": "*fp64", "alpha": "fp64", "label_smoothing": "fp64"}
        | pointers(of_features, features)
        | pointers(of_weight, weight)
        | pointers(labels, "i64")
        # Whatever is not named here.
        | {"pointer": f"*{compute}", "number": "i32"}
    )


def head_deviation_cases():
    """Pair of types, and a case of it. Sizes are the wrapper's for K = 10, 64 and 100000."""
    for index, (features, weight) in enumerate(PAIRS):
        types = deviation_types(features, weight)
        flag = index % 2 == 0
        small = types | {"d_logits_ptr": types["pointer"]}
        classes = 64 if index in (2, 3, 4) else 16
        yield (
            index,
            (
                "head_deviation_small_rows_kernel",
                small,
                {
                    "MEAN": flag,
                    "BLOCK_ROWS": 1024 if flag else 128,
                    "BLOCK_CLASSES": classes,
                    "BLOCK_FEATURES": (4096 if features == "fp64" else 8192) // classes,
                    "num_warps": 8,
                },
            ),
        )
        yield (
            index,
            (
                "head_deviation_small_weight_kernel",
                small,
                {
                    "MEAN": flag,
                    "BY_ROW": not flag,
                    "BLOCK_ALL": 1024 if flag else 128,
                    "BLOCK_ROWS": 128,
                    "BLOCK_FEATURES": 64,
                    "num_warps": 8,
                },
            ),
        )
        yield (
            index,
            (
                "head_deviation_rows_kernel",
                types,
                {"MEAN": flag, "BLOCK": 2048, "num_warps": 8},
            ),
        )
        finish = {"BY_ROW": flag, "BLOCK": 1024, "BLOCK_ROWS": 256, "BLOCK_CLASSES": 32}
        yield index, ("head_deviation_finish_kernel", types, finish | {"num_warps": 8})
        if features == weight:
            long = types | {"weight0_count": "i64", "d_weight_count": "i64"}
            constants = {"BLOCK": 4096, "num_warps": 8}
            yield index, ("head_deviation_weight_kernel", long, constants)


def inject_cases():
    """Types of output x channels x both layouts, with triggers and without; images of one pixel.

    A number that is 1 is a constant to Triton.
    """
    types = {"images_ptr": "*u8", "params_ptr": "*i32", "labels_ptr": "*i64"}
    types["tables"] = {
        **{"table": "*i32", "noise": "*fp32", "patterns": "*i16", "maps": "*u8"},
        **{"sources": "*i32", "coords": "*fp32", "lookup": "*u8"},
    }
    types |= {"number": "i32"}
    index = 0
    for kind in ("fp32", "bf16", "fp16"):
        for channels in (1, 3, 4):
            for triggers in (True, False):
                constants = {"C": channels, "HAS_TRIGGERS": triggers, "BLOCK": 256}
                constants["CHANNELS_LAST"] = index % 2 == 0
                outputs = pointers(("out_ptr", "lut_ptr"), kind)
                yield index // 2 + index // 6, ("inject_kernel", types | outputs, constants)
                index += 1
    sizes = dict.fromkeys(("height", "width", "out_height", "out_width"), 1)
    one_pixel = {"C": 1, "HAS_TRIGGERS": True, "BLOCK": 256, "CHANNELS_LAST": True, **sizes}
    yield index, ("inject_kernel", types | outputs, one_pixel)
