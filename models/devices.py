# %% [markdown]
# # 8. Devices
#
# Where does TensorFlow compute? You list devices, place ops on them, read where ops ran, build a graph whose model is
# on one device and whose loss is on another, and train on two replicas that compute what one device does with the whole
# batch. It runs in seconds, on a machine without a GPU too: there a CPU is made to look like two.
#
# This file is a script, `python models/devices.py`, and a notebook, `models/devices.ipynb`, of the same text.

# %%
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import tfops.keras
from trainer.data import load_mnist

FOLDER = Path("runs/lessons/devices")  # the picture goes there
BATCH_SIZE = 64  # images a step, over all replicas
STEPS = 15  # of the exercise in the graph style
LEARNING_RATE = 0.1

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))
tf.get_logger().setLevel("ERROR")  # tf.distribute tells much

# %% [markdown]
# ## Which devices are there?
#
# *Physical* devices are what the machine has. *Logical* ones are what ops are placed on. Usually there is one for each
# physical device, but a CPU (or a GPU, with a `memory_limit` for each part) can be cut into several, to try programs
# for several devices. TensorFlow reads these settings once, when it makes its devices; so they stand before all else.

# %%
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

# %% [markdown]
# TensorFlow takes all of a GPU's memory at once, unless memory growth is set: then it takes it as it is needed. Set it
# where several programs share a GPU. (The price: memory may be fragmented, and it is never given back before the end.)

# %%
gpus = tf.config.list_physical_devices("GPU")
for gpu in gpus:
    tf.config.experimental.set_memory_growth(gpu, True)
print("physical:", [device.name for device in tf.config.list_physical_devices()])
print("logical: ", [device.name for device in tf.config.list_logical_devices()])

first, second = ("/CPU:0", "/GPU:0") if gpus else ("/CPU:0", "/CPU:1")

# %% [markdown]
# ## Placement
#
# Without `tf.device`, an op runs on the first GPU if there is one and the op has a kernel for it, else on the CPU. A
# tensor knows where it is. Ops that read a tensor of another device get a copy.

# %%
a = tf.random.normal([2, 3])
with tf.device(second):
    b = tf.random.normal([3, 2])
    product = a @ b
for name, tensor in (("a", a), ("b", b), ("a @ b", product)):
    print(f"{name:5} on {tensor.device}")

# %% [markdown]
# `tf.debugging.set_log_device_placement(True)` prints where every op runs (of a script only with the environment
# variable `TF_CPP_MIN_LOG_LEVEL=0`).
#
# *Soft placement* runs an op elsewhere if the device that was asked for does not exist or has no kernel for it. That is
# the default. Without it there is an error, which is better where a program silently on the CPU would be a loss:

# %%
for soft in (True, False):
    tf.config.set_soft_device_placement(soft)
    try:
        with tf.device("/GPU:7"):
            print("soft placement:", tf.add(1, 1).device)
    except tf.errors.InvalidArgumentError as error:
        print("no soft placement:", error.message.partition(".")[0])
tf.config.set_soft_device_placement(True)

# %% [markdown]
# ## The graph style: the model on one device, the loss on another
#
# In TensorFlow 1's style a session has all these settings in a `ConfigProto`. The exercise: put model and variables on
# one device, loss and optimizer on another, and find out what that costs.

# %%
v1 = tf.compat.v1
graph = tf.Graph()
with graph.as_default():
    v1.set_random_seed(1)
    with tf.device(first):
        images = v1.placeholder(tf.float32, [None, 784], name="images")
        labels = v1.placeholder(tf.int32, [None], name="labels")
        weights = v1.get_variable("weights", [784, 100])
        scale = v1.get_variable("scale", [100], initializer=v1.ones_initializer())
        offset = v1.get_variable("offset", [100], initializer=v1.zeros_initializer())
        hidden, *_ = tfops.fused_batch_norm(images @ weights, scale, offset, axis=1, activation="relu", name="hidden")
        logits = tf.matmul(hidden, v1.get_variable("output_weights", [100, 10]), name="logits")
    with tf.device(second):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        loss = tf.reduce_mean(losses, name="loss")
        train = v1.train.GradientDescentOptimizer(LEARNING_RATE).minimize(loss)
    initialize = v1.global_variables_initializer()

config = v1.ConfigProto(
    device_count={"CPU": 2},  # logical CPU devices
    allow_soft_placement=True,  # here the default is False
    log_device_placement=False,  # True: print where every op is, once
    gpu_options=v1.GPUOptions(allow_growth=True),
)

# %% [markdown]
# A session cuts the graph in parts, one for each device, and where a tensor crosses from one to another it puts in a
# pair of ops, `_Send` and `_Recv`. `RunMetadata` brings the parts back.

# %%
digits = load_mnist()
chosen = np.random.default_rng(1).permutation(len(digits.x_train))
x, y = digits.x_train[chosen].reshape(-1, 784).astype("float32") / 255, digits.y_train[chosen].astype("int32")
options, metadata = v1.RunOptions(output_partition_graphs=True), v1.RunMetadata()
with v1.Session(graph=graph, config=config) as session:
    session.run(initialize)
    for step in range(STEPS):
        batch = slice(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        _, loss_value = session.run([train, loss], {images: x[batch], labels: y[batch]}, options, metadata)
        if step in (0, STEPS - 1):
            print(f"step {step + 1}: loss {loss_value:.2f}")

for part in metadata.partition_graphs:
    received = sorted({node.name.rpartition("/")[0] for node in part.node if node.op == "_Recv"})
    print(f"{part.node[0].device} runs {len(part.node)} ops, and receives:", *received, sep="\n  ")

# %% [markdown]
# The second device was asked for the gradients too, for `minimize` makes them. So it gets all that backward ops read:
# the images, what batch norm read and wrote (`matmul`, `hidden`), its scale and the output weights (the
# `ReadVariableOp`s), and not only the logits and the labels, which the loss needs. Each variable is updated where it is
# stored, so gradients and learning rate travel back. On a CPU this is a copy in memory; between a CPU and a GPU all of
# it crosses the bus, in every step.
#
# ## Replicas
#
# To use several devices well, give each the whole model and a share of every batch. `tf.distribute.MirroredStrategy`
# keeps the copies of the variables the same: it sums gradients over the replicas before they are applied. Batch norm is
# the one layer that looks at more than one image at a time: with `synchronized=True` it takes its statistics over all
# replicas. Then two replicas compute what one device does with the whole batch. See it here for one step:


# %%
def make_model(synchronized):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(100, use_bias=False, name="hidden"),
            tfops.keras.BatchNormalization(activation="relu", synchronized=synchronized, name="norm"),
            keras.layers.Dense(10, name="logits"),
        ],
        name="model",
    )
    model.optimizer = keras.optimizers.SGD(LEARNING_RATE)
    model.optimizer.build(model.trainable_variables)
    return model


def training_step(model, images, labels):
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        loss = tf.reduce_sum(losses) / BATCH_SIZE  # of the whole batch: the optimizer sums the replicas' gradients
    model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    return logits


whole_images, whole_labels = x[:BATCH_SIZE], y[:BATCH_SIZE]
devices = [f"/GPU:{i}" for i in range(len(gpus))] if len(gpus) > 1 else ["/CPU:0", "/CPU:1"]
with tf.device(devices[0]):
    one = make_model(synchronized=False)
    expected_logits = training_step(one, whole_images, whole_labels)

# %%
strategy = tf.distribute.MirroredStrategy(devices)


def shares(whole):
    parts = np.array_split(whole, len(devices))
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


@tf.function
def replicas_step(model, images, labels):
    return strategy.run(training_step, (model, images, labels))


figure, axes = plt.subplots(layout="constrained")
for synchronized in (True, False):
    with strategy.scope():
        model = make_model(synchronized)
    logits = strategy.gather(replicas_step(model, shares(whole_images), shares(whole_labels)), axis=0)
    differences = {"logits": np.abs(logits - expected_logits).max()}
    for variable, expected in zip(model.variables, one.variables, strict=True):
        differences[variable.path] = np.abs(variable.numpy() - expected.numpy()).max()
    print(f"{len(devices)} replicas, synchronized={synchronized}: largest differences from one device")
    print(*(f"  {name}: {difference:.0e}" for name, difference in differences.items()), sep="\n")
    axes.plot(
        np.maximum(list(differences.values()), 1e-10), list(differences), "o", label=f"synchronized={synchronized}"
    )
axes.set(xscale="log", xlabel="largest difference from one device")
axes.legend()
figure.savefig(FOLDER / "replicas.png")
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# Synchronized, all differences are of the size of float32's roundings. If each replica takes the statistics of its own
# share, it is another computation: not a wrong one, but one that depends on the number of devices.
#
# ## Exercises
#
# 1. Give `minimize` the argument `colocate_gradients_with_ops=True`. What crosses from device to device now?
# 2. Give the first replica 48 of the 64 images and the second 16. Does `synchronized=True` still compute what one
#    device does? Why would the mean of the replicas' variances be wrong?
# 3. Divide each replica's loss by the number of *its* images, as a mean does. By what factor are the gradients wrong?
#
# Answers: [answers/devices.md](answers/devices.md)
