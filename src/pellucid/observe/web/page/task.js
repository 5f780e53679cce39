// What a run is trained to predict, in the words of its views: the next token, a document's class, or its numbers.
import { count, number, percent } from "./format.js";

/** A recorded label in words: a class by its name, numbers with theirs and four digits. */
export function labelOf(label, head) {
  if (label === null || label === undefined || head?.problem_type !== "regression") return label;
  const values = [JSON.parse(label)].flat();
  return values.map((value, k) => (values.length > 1 ? `${head.labels[k]} ${number(value)}` : number(value))).join(", ");
}

/** {labelled, head, unit, each (what a loss belongs to), guess: {value, words} or null, share(loss): chance of what is right or
 * null, meaning(loss): a clause}. */
export function taskOf(run) {
  const config = run.meta?.config ?? run.config ?? {}, head = config.model?.head, training = config.training ?? {}, V = config.model?.vocab_size;
  if (!head) return { labelled: false, head: null, unit: "nats", each: "token", share: (loss) => Math.exp(-loss), meaning: (loss) => `the right token gets ${percent(Math.exp(-loss), 2)} on (geometric) average`,
    guess: V ? { value: Math.log(V), label: "guessing", words: `Guessing among ${count(V)} tokens would give ${number(Math.log(V))}.` } : null };
  const labelled = { labelled: true, head, each: "document" };
  if (head.problem_type === "regression") {
    const square = training.huber_delta === null || training.huber_delta === undefined;
    return { ...labelled, unit: square ? "σ²" : "σ² (Huber)", share: () => null,
      meaning: (loss) => (square ? `predictions are ${number(Math.sqrt(loss))} standard deviations off (root mean square)` : "large errors count by their size, not their square"),
      guess: square ? { value: 1, label: "the mean", words: "Always saying the mean of the training documents would give about 1." } : null };
  }
  const plain = !training.label_smoothing && !Object.keys(training.class_weights ?? {}).length, C = head.labels.length;
  return { ...labelled, unit: "nats", share: (loss) => (plain ? Math.exp(-loss) : null),
    meaning: (loss) => (plain ? `the right class gets ${percent(Math.exp(-loss), 2)} on (geometric) average` : "label smoothing or class weights are part of it"),
    guess: plain ? { value: Math.log(C), label: "guessing", words: `Guessing among ${count(C)} classes would give ${number(Math.log(C))}.` } : null };
}
