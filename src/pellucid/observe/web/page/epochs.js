// How often the data was read: an epoch has as many rows as the weights of the sources make of it.

/** Epochs read once a step is done; river: the answer "river", null where it does not tell. */
export function epochsOf(river, run, step) {
  const rows = river?.rows_per_epoch, batch = run.config?.training?.batch_size;
  return rows && batch ? ((step + 1) * batch) / rows : null;
}
