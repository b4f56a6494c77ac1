"""The mutants: deliberate bugs, each with the tests that must notice it.

A mutant is a text of a file and what replaces it, so that it survives edits of other lines. The
text occurs exactly once in the file (`tests/test_mutants.py` checks that).
"""

from typing import NamedTuple


class Mutant(NamedTuple):
  """One deliberate bug."""

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]  # at least one of them must fail

  def applied(self, text: str) -> str:
    """Returns the file's text with the bug; raises ValueError if it does not fit."""
    if text.count(self.old) != 1:
      raise ValueError(f"{self.name}: its text occurs {text.count(self.old)} times in {self.file}")
    return text.replace(self.old, self.new)


def _tests(file: str, *names: str) -> tuple[str, ...]:
  return tuple(f"tests/test_{file}.py::{name}" for name in names) or (f"tests/test_{file}.py",)


def _mutants(file: str, tests: tuple[str, ...], *changes: tuple[str, str, str]) -> list[Mutant]:
  """Makes the mutants (name, old, new) of one file that the same tests notice."""
  return [Mutant(name, file, old, new, tests) for name, old, new in changes]


_SAMF = _tests("by_value", "test_fusion_has_the_values_of_equations_1_to_6")
_STEP = _tests("by_value", "test_the_steps_of_a_run_are_those_computed_by_hand")
_SELECTS = _tests("by_value", "test_the_deployed_branch_selects_on_the_images_of_the_config")
_TIMED = _tests("by_value", "test_the_branch_that_is_timed_and_counted_is_the_deployed_one")
_NORM = _tests("ops", "test_batch_norm_has_the_variance_a_thousand_deviations_away")
_LOSS = _tests("losses")
_EFFECT = _tests("wiring", "test_every_setting_has_an_effect")
_DISJOINT = _tests("wiring", "test_train_held_out_and_test_images_are_disjoint_and_nothing_is_lost")
_WARPED = _tests("wiring", "test_masks_are_warped_by_the_nearest_pixel")
_COVER = _tests("statistics", "test_bootstrap_intervals_cover_the_truth_as_often_as_they_say")
_PAIRED = _tests(
  "statistics",
  "test_paired_intervals_cover_the_difference_and_independent_ones_are_too_wide",
)
_HSE = _tests(
  "metrics_hse",
  "test_the_target_curve_is_the_hand_computed_one",
  "test_a_centroid_exactly_3_pixels_away_is_a_miss",
  "test_the_first_component_in_raster_order_is_claimed_though_a_nearer_one_follows",
  "test_false_alarm_of_the_same_area_as_a_hit_counts_unless_dnanets_rule_is_asked_for",
  "test_diagonal_neighbours_are_one_component_unless_connectivity_is_4",
  "test_an_empty_image_counts_0_1_or_not_at_all_in_niou",
  "test_without_extension_the_curve_starts_at_its_lowest_recall",
  "test_a_score_on_a_threshold_is_not_above_it_also_in_float64",
  "test_equals_sklearn_and_skimage_on_random_maps_of_mixed_sizes",
)

MUTANTS: list[Mutant] = [
  # Layers.
  *_mutants(
    "fdep_jax/layers/basic.py",
    _NORM,
    (
      "the spread between images is a plain sum of squares",
      "coarse = jax.lax.reduce_precision(means, exponent_bits=8, mantissa_bits=7)",
      "coarse = means",
    ),
    (
      "values within an image are not shifted",
      "pixel = x[:, height // 2, width // 2]",
      "pixel = jnp.zeros((images, x.shape[-1]), x.dtype)",
    ),
    ("the spread between images lacks its rest", "  spread += 2 * (product - anchor * rest)\n", ""),
  ),
  # Fusion.
  *_mutants(
    "fdep_jax/samf.py",
    _SAMF,
    ("SAMF swaps the halves", "multiply, add = jnp.split", "add, multiply = jnp.split"),
    ("SAMF gates without a sigmoid", "nnx.sigmoid(self.gate(prior))", "self.gate(prior)"),
    ("SAMF gates by tanh", "nnx.sigmoid(self.gate(prior))", "nnx.tanh(self.gate(prior))"),
    ("SAMF subtracts the shift", "add + self.shift(prior)", "add - self.shift(prior)"),
    ("SAMF multiplies by the shift", "add + self.shift(prior)", "add * self.shift(prior)"),
    ("SAMF has no residual", "[multiply, add], -1) + top", "[multiply, add], -1)"),
    ("SAMF joins in the other order", "concatenate([multiply, add]", "concatenate([add, multiply]"),
    ("SAMF ends before its 3×3", "self.refine2(self.refine1(fused))", "self.refine1(fused)"),
    ("SAMF aligns corners", "size, align_corners=False", "size, align_corners=True"),
    ("the sum is without the top feature", "return top + self.align", "return self.align"),
  ),
  *_mutants(
    "fdep_jax/samf.py",
    _tests("fdep", "test_a_fused_top_has_the_type_of_the_top"),
    ("SAMF returns its own type", "(fused)).astype(top.dtype)", "(fused))"),
  ),
  *_mutants(
    "fdep_jax/layers/basic.py",
    _tests("fdep", "test_flaxs_own_norms_train_in_bfloat16"),
    ("a convolution keeps its input's type", "    x = x.astype(kernel.dtype)\n", ""),
  ),
  *_mutants(
    "fdep_jax/forward.py",
    _tests("fdep", "test_a_network_of_one_channel_trains_on_the_mean_of_the_three"),
    (
      "a network of one channel sees the first",
      "normal.mean(-1, keepdims=True)",
      "normal[..., :1]",
    ),
  ),
  *_mutants(
    "fdep_jax/export/onnx.py",
    _tests("export", "test_an_operation_of_jax_and_flax_is_the_same_in_onnx"),
    ("ONNX takes another nearest pixel", '"round_prefer_ceil"', '"round_prefer_floor"'),
    (
      "ONNX enlarges with aligned corners",
      'mode="linear", coordinate_transformation_mode="half_pixel")',
      'mode="linear", coordinate_transformation_mode="align_corners")',
    ),
  ),
  *_mutants(
    "fdep_jax/fdep.py",
    _STEP,
    (
      "FDEP fuses the levels deep to shallow",
      "zip(self.fusion, levels, strict",
      "zip(self.fusion, levels[::-1], strict",
    ),
    (
      "FDEP feeds each module the raw top",
      "      top = fuse(top, level)\n    self",
      "      top = fuse(skips and top, levels[0])\n    self",
    ),
    (
      "FDEP's light branch sees the prior",
      "light = self.backbone.decode(skips, top)\n    return main",
      "light = main\n    return main",
    ),
    ("FDEP swaps its outputs", "return main, light", "return light, main"),
  ),
  # Loss.
  *_mutants(
    "fdep_jax/losses.py",
    _LOSS,
    ("edges weigh 2", "EDGE_WEIGHT = 4.0", "EDGE_WEIGHT = 2.0"),
    ("the loss mines a quarter", "HARD_FRACTION = 0.5", "HARD_FRACTION = 0.75"),
    ("the loss averages over all pixels", "/ jnp.sum(hard)", "/ losses.size"),
    ("ties at the threshold are dropped", "hard = losses >=", "hard = losses >"),
    ("only vertical edges are weighted", "return vertical | horizontal", "return vertical"),
    ("the released mode weights as intended", '| (edge_mode == "released")', "| (edge_mode == 0)"),
  ),
  Mutant(
    "logits of another shape broadcast",
    "fdep_jax/losses.py",
    "if logits.shape != (*mask.shape, 1):",
    "if logits.ndim < 3:",
    _tests("habits", "test_the_loss_refuses_what_it_would_sum_wrongly"),
  ),
  *_mutants(
    "fdep_jax/backbones/__init__.py",
    _STEP,
    (
      "only the last head is trained",
      "for head in logits.heads)",
      "for head in logits.heads[-1:])",
    ),
  ),
  *_mutants(
    "fdep_jax/step.py",
    _STEP,
    ("λ is ignored", 'config.loss.light_weight if config.mode == "fdep" else 1.0', "1.0"),
    ("λ weighs the detector alone", 'if config.mode == "fdep" else 1.0}', "}"),
    ("λ weighs the main branch", '{"main": 1.0, "light": config', '{"light": 1.0, "main": config'),
    ("the edge mode is not handed on", ", config.loss.edge_mode)", ")"),
    (
      "distillation runs the other way",
      'distillation(logits["main"], logits["light"], ',
      'distillation(logits["light"], logits["main"], ',
    ),
    (
      "distillation has the weight 1",
      "= config.loss.distill_weight\n  compute",
      "= 1.0\n  compute",
    ),
    ("AdamW's b1 is 0.95", "b1=0.9,", "b1=0.95,"),
    ("AdamW's b2 is 0.99", "b2=0.999,", "b2=0.99,"),
    ("AdamW's eps is 1e-3", "eps=1e-8,", "eps=1e-3,"),
    ("AdamW does not decay", "weight_decay=config.train.weight_decay", "weight_decay=0.0"),
    ("the schedule has twice the length", '"steps": steps}', '"steps": 2 * steps}'),
    (
      "the rate is constant",
      "    make_schedule(config, steps), b1",
      "    config.train.learning_rate, b1",
    ),
  ),
  *_mutants(
    "fdep_jax/ablations.py",
    _STEP,
    (
      "the teacher of distillation is trained",
      "jax.lax.stop_gradient(teacher).astype",
      "teacher.astype",
    ),
    (
      "distillation has no entropy term",
      "jnp.mean(cross - optax.sigmoid_binary_cross_entropy(teacher, prob))",
      "jnp.mean(cross)",
    ),
  ),
  # A run.
  *_mutants(
    "fdep_jax/train.py",
    _SELECTS,
    (
      "the main branch selects",
      "scores[forward.deployed_branch(config.mode)], config",
      'scores["main" if "main" in scores else "light"], config',
    ),
    (
      "IoU selects",
      "deployed_branch(config.mode)], config.eval.select_by",
      'deployed_branch(config.mode)], "iou"',
    ),
    (
      "the test images always select",
      'images.val if config.eval.select_on == "val" else images.test',
      "images.test",
    ),
    ("the train images select", "images.val if config", "images.train if config"),
  ),
  Mutant(
    "a run trains on the held-out images",
    "fdep_jax/train.py",
    "data.train_iterator(\n      self.images.train,",
    "data.train_iterator(\n      self.images.train + self.images.val,",
    _tests("wiring", "test_a_run_trains_on_its_train_images_only"),
  ),
  *_mutants(
    "fdep_jax/train.py",
    _EFFECT,
    (
      "crops have no margin",
      "crop_margin=config.data.crop_margin,\n      process_index",
      "process_index",
    ),
    (
      "checkpoints ignore their interval",
      "step % config.checkpoint.every_steps == 0 or last",
      "step % 4 == 0 or last",
    ),
    (
      "a step that is not finite never stops a run",
      'if self.config.train.nonfinite == "stop"',
      'if self.config.train.nonfinite == "never"',
    ),
  ),
  *_mutants(
    "fdep_jax/build.py",
    _DISJOINT,
    (
      "held-out images are trained on",
      "train, val = data.split_validation(",
      "_, val = data.split_validation(",
    ),
    ("the statistics are the test split's", "data.statistics(train)", "data.statistics(test)"),
    ("test scenes are the train scenes", "size, seed=2)", "size, seed=1)"),
  ),
  *_mutants(
    "fdep_jax/evaluate.py",
    _TIMED,
    (
      "the main branch is timed",
      "branch = forward.deployed_branch(config.mode)\n  if branch",
      'branch = "light" if config.mode == "original" else "main"\n  if branch',
    ),
    ("both branches are timed", "forward.ALONE[branch], image, prior", "config.mode, image, prior"),
  ),
  Mutant(
    "the warm-up is timed",
    "fdep_jax/evaluate.py",
    "min(seconds[1:])",
    "min(seconds)",
    _tests("by_value", "test_what_is_timed_is_one_run_of_the_deployed_program"),
  ),
  Mutant(
    "the main branch is deployed",
    "fdep_jax/forward.py",
    'return "main" if mode == "fdep_wo_coisd" else "light"',
    'return "light" if mode == "original" else "main"',
    _SELECTS,
  ),
  # Data.
  *_mutants(
    "fdep_jax/data/augment.py",
    _WARPED,
    (
      "masks are not rounded to the nearest pixel",
      "mask[(y + UNIT // 2) >> BITS, (x + UNIT // 2) >> BITS]",
      "mask[y >> BITS, x >> BITS]",
    ),
    (
      "the image is shifted the other way",
      "(centre + shift) - matrix",
      "(centre - shift) - matrix",
    ),
  ),
  *_mutants(
    "fdep_jax/data/augment.py",
    _tests("data_augment"),
    ("every sample is augmented", "if rng.random() >= 0.5:", "if rng.random() >= 1:"),
    (
      "a flip leaves the mask",
      "_turn(image, numbers), _turn(mask, numbers)",
      "_turn(image, numbers), mask",
    ),
    (
      "crops leave out the last position",
      "rng.integers(lowest, highest, endpoint=True)",
      "rng.integers(lowest, np.maximum(highest, 1))",
    ),
    ("contrast is doubled", "rng.uniform(0.7, 1.3)", "rng.uniform(0.4, 1.6)"),
  ),
  *_mutants(
    "fdep_jax/metrics/masks.py",
    _tests("data_folders"),
    ("masks are cut at half", "top > 255 else 127", "top > 255 else 63"),
  ),
  *_mutants(
    "fdep_jax/data/samples.py",
    _tests("data_folders"),
    (
      "the deviation is about a fixed mean",
      "(g.mean(), g.std()) for g",
      "(g.mean(), np.sqrt(((g - 0.4) ** 2).mean())) for g",
    ),
  ),
  *_mutants(
    "fdep_jax/data/frames.py",
    _tests("habits_files", "test_pictures_are_turned_as_their_exif_data_say"),
    (
      "pictures are not turned",
      "    picture = ImageOps.exif_transpose(picture)\n    if picture.mode.startswith",
      "    if picture.mode.startswith",
    ),
    (
      "TIFFs are opened by their path",
      "Image.open(file, formats=_FORMATS)",
      "Image.open(path, formats=_FORMATS)",
    ),
  ),
  Mutant(
    "prediction does not round the grey levels",
    "fdep_jax/data/frames.py",
    "    if whole:\n",
    "    if False:\n",
    _tests("habits_files", "test_prediction_sees_the_levels_of_the_training_bit_for_bit"),
  ),
  Mutant(
    "misspelt settings of a config file are accepted",
    "fdep_jax/settings.py",
    "_unknown_settings(values) if trains else []",
    "[]",
    _tests("habits", "test_misspelt_settings_of_a_config_file_are_refused_before_training"),
  ),
  Mutant(
    "the state of a step lies as the compiler likes",
    "fdep_jax/step.py",
    "return mesh.replicated(the_mesh) if the_mesh else None",
    "return None",
    _tests("train", "test_a_run_whose_prior_is_divided_among_devices_has_whole_checkpoints"),
  ),
  Mutant(
    "UTF-16 without its mark is read as UTF-8",
    "fdep_jax/data/folders.py",
    'if "\\0" in text:',
    "if not text:",
    _tests("habits_files", "test_split_files_of_another_encoding_are_refused_with_the_one_to_use"),
  ),
  Mutant(
    "names in both splits are accepted",
    "fdep_jax/data/folders.py",
    "set(names[one]) & set(names[other])",
    "set(names[one]) & set()",
    _tests("data_folders"),
  ),
  *_mutants(
    "fdep_jax/data/pipeline.py",
    _tests("data_pipeline"),
    (
      "epochs are not shuffled",
      "grain.MapDataset.range(count).shuffle(seed=shuffle_seed)",
      "grain.MapDataset.range(count)",
    ),
    (
      "processes share rows wrongly",
      "batches[process_index::process_count]",
      "batches[process_index::1]",
    ),
    (
      "evaluation pads at the left",
      "image[row, :h, :w] = samples[i].image",
      "image[row, -h:, -w:] = samples[i].image",
    ),
  ),
  *_mutants(
    "fdep_jax/data/resident.py",
    _tests("data_routes", "test_both_routes_give_the_same_bits"),
    (
      "devices number the noise by channel",
      "3 * (size * rows + columns)[None] + jnp.arange(3)[:, None, None]",
      "(size * rows + columns)[None] + size * size * jnp.arange(3)[:, None, None]",
    ),
    ("devices take noise as grey", "grey=jnp.zeros_like(crop.grey)", "grey=crop.grey"),
    ("devices read beyond a small image", "(rows < height) & (columns < width)", "rows >= 0"),
  ),
  Mutant(
    "lazy samples are kept",
    "fdep_jax/data/samples.py",
    "    return self._decode(self._places[index])",
    "    kept = vars(self)\n    return kept.setdefault(index, self._decode(self._places[index]))",
    _tests("data_routes", "test_few_lazy_samples_are_in_memory_at_a_time"),
  ),
  Mutant(
    "another route of input is another run",
    "fdep_jax/settings.py",
    r"data\.(threads|on_device|lazy)",
    r"data\.threads",
    _tests("data_routes", "test_a_run_continued_on_the_other_route_ends_with_the_same_bits"),
  ),
  # Metrics.
  *_mutants(
    "fdep_jax/metrics/components.py",
    _HSE,
    (
      "a distance of exactly 3 is a hit",
      "keep = (distance < max_distance)",
      "keep = (distance <= max_distance)",
    ),
    ("a component is claimed twice", "if claimed[t] < 0 and c not in taken", "if claimed[t] < 0"),
    ("corners always touch", "if connectivity == 8 or offset == 0", "if True"),
  ),
  *_mutants(
    "fdep_jax/metrics/hse.py",
    _HSE,
    ("the target curve is not extended", "  if options.extend:", "  if not options.extend:"),
    (
      "Fa forgives equal areas",
      'by_area = options.false_alarm == "area"',
      'by_area = options.false_alarm != "area"',
    ),
    ("IoU forgets the intersection", "targets + positive - true, 0.0)", "targets + positive, 0.0)"),
    (
      "an empty image has nIoU 1",
      "empty_niou: float | None = 0.0",
      "empty_niou: float | None = 1.0",
    ),
    ("HSE is the mean", "hse=hse_p * hse_t,", "hse=(hse_p + hse_t) / 2,"),
  ),
  *_mutants(
    "fdep_jax/metrics/pixels.py",
    _HSE,
    ("HSE-P is the step rule", "(count * (at + above) / 2).sum(-1)", "(count * at).sum(-1)"),
    ("ties count as above", "true_above = true_at_least - count", "true_above = true_at_least"),
  ),
  # Statistics.
  *_mutants(
    "fdep_jax/metrics/bootstrap.py",
    _COVER,
    ("intervals are of 90 %", "[(1 - level) / 2, (1 + level) / 2]", "[1 - level, level]"),
    (
      "intervals are of half the width",
      "[(1 - level) / 2, (1 + level) / 2]",
      "[0.5 - level / 4, 0.5 + level / 4]",
    ),
    (
      "images are drawn four times too often",
      "rng.multinomial(images, np.full(images, 1 / images), size=resamples)",
      "rng.multinomial(4 * images, np.full(images, 1 / images), size=resamples)",
    ),
  ),
  *_mutants(
    "fdep_jax/metrics/bootstrap.py",
    _PAIRED,
    (
      "a comparison draws independently",
      "left, right = samples(a, weights), samples(b, weights)",
      "left, right = samples(a, weights), samples(b, draw(len(ours), resamples, seed + 1))",
    ),
    (
      "a comparison has the other sign",
      "gap = left[name] - right[name]",
      "gap = right[name] - left[name]",
    ),
  ),
  *_mutants(
    "fdep_jax/metrics/bootstrap.py",
    _tests(
      "statistics",
      "test_t_intervals_of_a_few_seeds_cover_the_mean_and_normal_ones_do_not",
      "test_a_t_interval_is_that_of_a_printed_table",
      "test_every_image_is_drawn_equally_often_and_seeds_differ",
      "test_the_default_interval_is_the_one_of_95_percent",
    ),
    ("the t interval takes n degrees", "special.stdtrit(count - 1,", "special.stdtrit(count,"),
    ("the t interval takes the population's deviation", "np.std(values, ddof=1)", "np.std(values)"),
    (
      "the seed is ignored",
      "rng = np.random.default_rng(seed)\n  return rng.multinomial",
      "rng = np.random.default_rng(0)\n  return rng.multinomial",
    ),
    (
      "the default interval is of 68 %",
      "def intervals(total, resamples=1000, level=0.95",
      "def intervals(total, resamples=1000, level=0.68",
    ),
  ),
  # Tables.
  *_mutants(
    "fdep_jax/tables/table.py",
    _tests(
      "sweep",
      "test_a_table_has_the_papers_numbers_ours_and_the_difference",
      "test_rows_with_maps_are_compared_on_the_same_images",
    )
    + _tests("results"),
    (
      "the difference has the other sign",
      "return self.mean - self.paper",
      "return self.paper - self.mean",
    ),
    (
      "the deviation is the population's",
      "statistics.stdev(self.values) if",
      "statistics.pstdev(self.values) if",
    ),
    (
      "a table shows the median",
      "statistics.fmean(self.values) if",
      "statistics.median(self.values) if",
    ),
    ("paired rows are swapped", "left[key] - right[key]", "right[key] - left[key]"),
  ),
  # Resume.
  *_mutants(
    "fdep_jax/train.py",
    _tests("train", "test_same_seed_and_an_interruption_give_identical_parameters"),
    (
      "a continued run starts its data again",
      'iterator.set_state({"next_index": self.start})',
      'iterator.set_state({"next_index": 0})',
    ),
    (
      "a continued run keeps old metrics",
      '(self.workdir / "metrics.json").unlink(missing_ok=True)',
      "pass",
    ),
  ),
  Mutant(
    "the checksum leaves out the values",
    "fdep_jax/runtime/checkpoint.py",
    "crc = zlib.crc32(np.asarray(array).tobytes(), crc)",
    'crc = zlib.crc32(b"", crc)',
    _tests("faults", "test_flipped_bits_of_values_are_noticed"),
  ),
  Mutant(
    "a run continues on other data",
    "fdep_jax/train.py",
    "if found != ours.get(name)]",
    "if found is None]",
    _tests("guards", "test_a_run_does_not_continue_on_other_data"),
  ),
  Mutant(
    "a fingerprint leaves out the masks",
    "fdep_jax/data/samples.py",
    "for array in (sample.image, sample.mask):",
    "for array in (sample.image,):",
    _tests("guards", "test_a_fingerprint_depends_on_every_pixel_and_the_order"),
  ),
  Mutant(
    "maps of other test images are compared",
    "fdep_jax/tables/figures.py",
    "known != data.fingerprint(images)",
    "not known",
    _tests("guards", "test_maps_of_other_test_images_are_not_compared"),
  ),
  *_mutants(
    "fdep_jax/score.py",
    _tests(
      "guards",
      "test_no_cell_of_a_csv_file_is_run_as_a_formula",
      "test_a_small_file_that_unpacks_to_a_huge_array_is_refused_before_it_is_unpacked",
    ),
    ("a file name may be a formula", "columns.csv_text(stem)", "stem"),
    ("any NPZ is unpacked", "if largest > MAX_BYTES:", "if largest < 0:"),
  ),
  *_mutants(
    "fdep_jax/score.py",
    _tests(
      "metrics_score",
      "test_maps_that_are_lower_on_targets_are_warned_of",
      "test_both_detectors_are_in_every_file_and_can_be_told_apart",
      "test_results_of_other_inputs_are_not_replaced",
    ),
    ("inverted maps are not warned of", "or targets >= others:", "or targets >= 0:"),
    (
      "the files of the second detector hold the first",
      'ending = "_compared" if name == "compared" else ""',
      'ending, found = "_compared" if name == "compared" else "", sets["predictions"]',
    ),
    ("results of other options are replaced", ', "options": vars(options)}', "}"),
  ),
  Mutant(
    "results of other inputs are replaced",
    "fdep_jax/report/folder.py",
    "if found is None or all(",
    "if found is None or any(",
    _tests("metrics_score", "test_results_of_other_inputs_are_not_replaced"),
  ),
  Mutant(
    "a broken train split is taken for none",
    "fdep_jax/data/folders.py",
    "whole = not any(_child(part, [c]) for c in choices)",
    "whole = True",
    _tests(
      "habits_files",
      "test_validate_takes_a_set_without_a_train_split_but_not_with_a_bad_one",
    ),
  ),
  Mutant(
    "a name of a row may be a formula",
    "fdep_jax/tables/table.py",
    "tuple(map(csv_text, (result.row.name",
    "tuple(map(str, (result.row.name",
    _tests("guards", "test_no_cell_of_a_csv_file_is_run_as_a_formula"),
  ),
  *_mutants(
    "fdep_jax/tables/table.py",
    _tests("guards", "test_rows_are_timed_anew_at_the_papers_size_in_one_process"),
    ("rows are timed at another size", "TIMED_SIZE = 448", "TIMED_SIZE = 256"),
    (
      "the deployed branch is timed with a prior",
      "prior = None if light else build",
      "prior = build",
    ),
  ),
  # Plan.
  *_mutants(
    "fdep_jax/plan.py",
    _tests("plan", "test_both_refusals_of_the_tpu_compiler_are_understood"),
    ("a plan reads MiB as GiB", '2 ** (10 * (1 + "KMGT"', '2 ** (10 * (2 + "KMGT"'),
    ("a plan forgets the arguments", "return value if whole else value + held", "return value"),
  ),
  *_mutants(
    "fdep_jax/runtime/hlo.py",
    _tests("plan", "test_convolutions_of_cudnn_cost_what_the_forward_convolution_does"),
    (
      "a plan counts a gradient of cuDNN as a forward pass",
      '"__cudnn$convBackwardInput": (0, 2, 1)',
      '"__cudnn$convBackwardInput": (1, 2, 0)',
    ),
  ),
  *_mutants(
    "fdep_jax/plan.py",
    _tests("plan", "test_a_gpu_that_is_too_small_gets_the_largest_batch_and_the_dtype_that_helps"),
    (
      "a plan for a GPU stops at the first batch that fits",
      "while gpu and rows and",
      "while False and rows and",
    ),
  ),
  *_mutants(
    "fdep_jax/build.py",
    _tests("guards", "test_a_plan_is_of_the_parameters_that_a_run_trains"),
    (
      "a plan freezes the ViT",
      "variable = nnx.Param if config.prior.unfreeze else dinov2.Frozen\n  return",
      "variable = dinov2.Frozen\n  return",
    ),
  ),
  *_mutants(
    "fdep_jax/plan.py",
    _tests("guards", "test_a_plan_is_of_the_parameters_that_a_run_trains"),
    ("a plan needs the network's top", "    if not on_dino:", "    if True:"),
    (
      "a trained ViT costs its forward pass",
      'least["trained_vit"] = passes *',
      'least["trained_vit"] = 2 * rows *',
    ),
  ),
  # Export.
  *_mutants(
    "fdep_jax/export/__init__.py",
    _tests(
      "export",
      "test_the_manifest_has_the_metrics_of_the_exported_step_only",
      "test_nothing_is_left_if_a_file_gives_other_numbers",
    ),
    (
      "the manifest takes any step's metrics",
      'candidate.get("checkpoint") == step and',
      "candidate and",
    ),
    (
      "a file with other numbers is kept",
      "if not difference <= TOLERANCE:",
      "if not difference <= 9:",
    ),
  ),
  # Report.
  Mutant(
    "a report does not know the parts of a union",
    "fdep_jax/report/__init__.py",
    '"part": part,',
    '"part": "",',
    _tests("habits", "test_a_union_always_reports_its_parts"),
  ),
  *_mutants(
    "fdep_jax/report/__init__.py",
    _tests(
      "report",
      "test_a_level_map_gives_the_mask_at_every_threshold_of_the_page",
      "test_runs_that_cannot_share_a_report_are_named",
    ),
    (
      "a report rounds its levels up",
      "np.searchsorted(THRESHOLDS, prob[active])",
      'np.searchsorted(THRESHOLDS, prob[active], "right")',
    ),
    (
      "reports of other masks are joined",
      'keys = ("name", "height", "width", "mask")',
      'keys = ("name", "height", "width")',
    ),
  ),
  # What an evaluation counts and keeps.
  Mutant(
    "selection scores other pixels than evaluation",
    "fdep_jax/train.py",
    "      self.selection,\n",
    "      [s._replace(image=s.image // 2) for s in self.selection],\n",
    _tests("train", "test_selection_and_final_evaluation_score_a_checkpoint_alike"),
  ),
  Mutant(
    "HSE selects whatever the config says",
    "fdep_jax/train.py",
    "getattr(scores[forward.deployed_branch(config.mode)], config.eval.select_by)",
    'getattr(scores[forward.deployed_branch(config.mode)], "hse")',
    _SELECTS,
  ),
  Mutant(
    "images are kept in the order in which they came",
    "fdep_jax/evaluate.py",
    "places = np.argsort(order)",
    "places = np.arange(len(order))",
    _tests(
      "metrics_per_image",
      "test_images_are_counted_in_the_order_of_the_samples_whatever_comes_first",
    ),
  ),
  Mutant(
    "accelerators count by numpy",
    "fdep_jax/evaluate.py",
    'jax.default_backend() != "cpu" if',
    'jax.default_backend() == "tpu" if',
    _tests("metrics_per_image", "test_the_route_is_the_jitted_one_where_the_backend_is_no_cpu"),
  ),
  Mutant(
    "rows that fill a batch are counted",
    "fdep_jax/metrics/jitted.py",
    "keep, self._waiting = slice(len(self._waiting)), []",
    "keep, self._waiting = slice(None), []",
    _tests("metrics_per_image", "test_the_jitted_counter_adds_no_image_that_was_not_given"),
  ),
  *_mutants(
    "fdep_jax/metrics/per_image.py",
    _tests(
      "metrics_per_image",
      "test_intervals_and_comparisons_from_the_file_are_those_of_the_maps",
      "test_without_any_target_the_file_still_has_its_counts",
    ),
    (
      "differences are read as counts",
      'np.cumsum(data[f"{name}.reached"], axis=1, dtype=np.int64)',
      'data[f"{name}.reached"].astype(np.int64)',
    ),
    ("counts are cut to 16 bits", "np.min_scalar_type(int(array.max(initial=0)))", "np.uint16"),
  ),
  Mutant(
    "counts of another evaluation are taken",
    "fdep_jax/tables/figures.py",
    "if found is None or tuple(known.values()) != sums:",
    "if found is None:",
    _tests("sweep", "test_the_counts_of_the_images_give_the_comparison_of_the_maps"),
  ),
  Mutant(
    "runs on different images are compared",
    "fdep_jax/tables/table.py",
    "        bootstrap.check_pair(*pair)",
    "        assert pair",
    _tests("sweep", "test_runs_on_different_test_images_are_not_compared"),
  ),
  *_mutants(
    "fdep_jax/tables/table.py",
    _tests(
      "sweep",
      "test_the_parts_of_a_union_are_compared_by_themselves",
      "test_a_difference_has_an_interval_over_images_and_one_over_seeds",
    ),
    ("every part of a union is its first images", "      start += size\n", ""),
    (
      "the interval over seeds is that over images",
      "bootstrap.t_interval(self.by_seed)",
      "self.low, self.high",
    ),
  ),
  Mutant(
    "a look at a lock makes a start fail",
    "fdep_jax/runtime/files.py",
    "_PATIENCE = 1.0",
    "_PATIENCE = 0.0",
    _tests("sweep", "test_looking_at_a_run_never_makes_its_start_fail"),
  ),
  *_mutants(
    "fdep_jax/start.py",
    _tests(
      "init_from",
      "test_a_light_branch_fills_the_network_and_both_sets_of_statistics",
      "test_weights_that_do_not_fit_are_refused_by_name",
    ),
    (
      "the main branch keeps new statistics when it starts from a light branch",
      "weights.get(_OWN + name.removeprefix(_MAIN_STATS), mine[name])",
      "mine[name]",
    ),
    (
      "weights that the network has not are dropped",
      "    if left:\n",
      "    if left and fused is None:\n",
    ),
  ),
  Mutant(
    "a training does not start from the weights that it names",
    "fdep_jax/train.py",
    "        start.fill(model, weights, source)",
    "        assert source",
    _tests("init_from", "test_a_training_begins_with_these_weights_and_a_new_optimizer"),
  ),
  Mutant(
    "the deployed branch is scored with the other's levels computed",
    "fdep_jax/forward.py",
    "    mode = ALONE[deployed_branch(mode)]",
    "    assert mode",
    _tests("wiring", "test_the_deployed_branch_alone_is_scored_alike_and_without_the_prior"),
  ),
  Mutant(
    "prediction without a run does not take the best of the zoo",
    "fdep_jax/detector.py",
    "    which = zoo.BEST",
    "    which = None",
    _tests("zoo", "test_the_shipped_frame_is_a_scene_whose_targets_are_all_found"),
  ),
  Mutant(
    "a network of the zoo loses its running statistics",
    "fdep_jax/detector.py",
    "  nnx.update(model.backbone, checkpoint.unflatten(arrays, weights))",
    "  nnx.update(model.backbone, checkpoint.unflatten(arrays, weights).filter(nnx.Param))",
    _tests("zoo", "test_the_shipped_frame_is_a_scene_whose_targets_are_all_found"),
  ),
]
