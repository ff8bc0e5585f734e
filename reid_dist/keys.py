"""Every configuration key with its default and its meaning; which values it takes, which may change on a resume.

The keys of Simple-ReID keep their names, defaults and meanings. A config defines the mathematics of a run; world size,
hardware and launcher are not in it.
"""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

_C = CfgNode()

_C.DATA = CfgNode()
_C.DATA.ROOT = ""  # folder that holds the data set (or is it); several: one for all, or NAME=FOLDER,NAME=FOLDER
_C.DATA.DATASET = "market1501"  # which data set, or several joined by +: trains on their union
_C.DATA.MANIFEST = ""  # data set csv: the table below ROOT; '': manifest.csv or manifest.parquet
_C.DATA.MSMT17_VAL = False  # MSMT17: list_val is trained on too (32,621 images instead of 30,248)
_C.DATA.SPLIT_ID = 0  # CUHK03: which of the classic splits
_C.DATA.CUHK03_LABELED = False  # CUHK03: hand-drawn boxes instead of detected ones
_C.DATA.CUHK03_CLASSIC_SPLIT = False  # CUHK03: the 20 classic splits instead of the new protocol
_C.DATA.ON_BAD_IMAGE = "error"  # an image that cannot be decoded: error | skip: train and evaluate without it
_C.DATA.VAL_IDS = 0  # training identities held out, to choose the best checkpoint on instead of on the test set
_C.DATA.NUM_WORKERS = 4  # threads (dali) or processes (torch) that prepare images, per rank
_C.DATA.HEIGHT = 256  # of the network's input, pixels
_C.DATA.WIDTH = 128  # of the network's input, pixels
_C.DATA.TRAIN_BATCH = 64  # images of the global batch, over all ranks
_C.DATA.TEST_BATCH = 512  # images per rank at test
_C.DATA.NUM_INSTANCES = 4  # K: images of an identity in a batch
# chunk: the original's chunks of K; identity: P distinct identities x K in every batch; identity_camera: likewise, an
# anchor's other instances from other cameras first
_C.DATA.SAMPLER = "chunk"
_C.DATA.PIPELINE = "auto"  # dali | torch (PIL in worker processes) | auto: dali where it can be imported
_C.DATA.DECODE_DEVICE = "auto"  # where DALI decodes: cpu | gpu | auto: the device that trains
# Training images in memory: off | encoded (the files, once per node) | resized (the pixels, once per node) | device
# (the pixels, in the memory of each GPU). No number depends on it.
_C.DATA.CACHE = "off"
_C.DATA.CACHE_GB = 8.0  # memory of a node for the cache; what does not fit gives way to the next smaller kind
_C.DATA.CACHE_DEVICE_GB = 8.0  # memory of each GPU for DATA.CACHE device; what does not fit falls back to resized

_C.AUG = CfgNode()
_C.AUG.RC_PROB = 0.5  # probability of the random crop from 1.125 times the size
_C.AUG.RE_PROB = 0.5  # probability of random erasing
# What is erased becomes: constant: the original's colour (.4914, .4822, .4465) after normalising; mean: ImageNet's mean
# colour, 0 after normalising; noise: standard normal noise after normalising
_C.AUG.RE_FILL = "constant"
_C.AUG.PAD = (
    0  # pixels of black border, of which a random part of the image's size is cut (10 in Bag of Tricks); 0: off
)
_C.AUG.AA_PROB = 0.0  # probability of AutoAugment's ImageNet policy (0.1 in fast-reid)
_C.AUG.CJ_PROB = 0.0  # probability of colour jitter; the amounts below are fast-reid's
_C.AUG.CJ_BRIGHTNESS = 0.15  # factor within 1 +- this
_C.AUG.CJ_CONTRAST = 0.15  # likewise
_C.AUG.CJ_SATURATION = 0.1  # likewise
_C.AUG.CJ_HUE = 0.1  # turns of the colour circle, at most 0.5
_C.AUG.BLUR_PROB = 0.0  # probability of Gaussian blur
_C.AUG.BLUR_SIGMA = 2.0  # its largest deviation in pixels, at most 10; the smallest is 0.1
_C.AUG.GREY_PROB = 0.0  # probability of a grey patch: the colour is taken from a rectangle as random erasing draws it

_C.MODEL = CfgNode()
_C.MODEL.NAME = "resnet50"  # which network; timm/<name>: any of timm's
_C.MODEL.RES4_STRIDE = 1  # stride of ResNet's last stage: 1 or 2
_C.MODEL.IANET = CfgNode()
_C.MODEL.IANET.VARIANT = "released"  # ianet's attention: released (the authors' code) | normalised (docs/networks.md)
_C.MODEL.FEATURE_DIM = 2048  # width of the feature; must equal the network's
_C.MODEL.HEAD = "simple"  # simple: one feature, after the batch norm; bnneck: the pair loss takes the one before it
_C.MODEL.POOL = "avg"  # of the network's map to a feature: avg | gem | max+avg
_C.MODEL.EMBED_DIM = 0  # width of a linear layer before the batch norm, and of the feature then; 0: none
_C.MODEL.NON_LOCAL = False  # non-local blocks in a ResNet-50's layer2 and layer3, as AGW
_C.MODEL.RESUME = ""  # like --resume: auto, or a checkpoint
_C.MODEL.PRETRAINED = "imagenet"  # '' (random), imagenet, or a file of backbone weights
_C.MODEL.BN_GROUP = 32  # batch norm statistics over so many consecutive images of the global batch; 0: all of them
_C.MODEL.CLASSIFIER_SHARDED = (
    False  # each rank keeps num_pids / ranks rows of the classifier: for 100,000s of identities
)

_C.LOSS = CfgNode()
_C.LOSS.CLA_LOSS = "crossentropy"  # crossentropy | crossentropylabelsmooth | arcface | cosface | circle
_C.LOSS.CLA_S = 16.0  # scale of arcface, cosface, circle
_C.LOSS.CLA_M = 0.0  # margin of arcface, cosface, circle
_C.LOSS.PAIR_LOSS = "triplet"  # triplet | softtriplet | weightedtriplet (no margin) | contrastive | cosface | circle
_C.LOSS.PAIR_S = 16.0  # scale of contrastive, cosface, circle
_C.LOSS.PAIR_M = 0.3  # margin of triplet, cosface, circle
_C.LOSS.PAIR_DISTANCE = ""  # of the triplet losses: cosine | euclidean; '': TEST.DISTANCE, as the original
_C.LOSS.CENTER = 0.0  # weight of the center loss, counted with the pair loss; Bag of Tricks has 0.0005; 0: none
_C.LOSS.CENTER_LR = 0.5  # learning rate of the centers (plain SGD on the unweighted loss)
_C.LOSS.GATHER = True  # pairs over the global batch; False: each rank alone, outside the promise

_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0  # epochs taken as done at the start of a fresh run
_C.TRAIN.MAX_EPOCH = 60  # epochs of the run
_C.TRAIN.MAX_STEPS = 0  # stop (and evaluate) after so many steps since the run's beginning; 0: no limit
# fp32 (IEEE) | tf32 (fp32, but products of TF32 factors on a GPU) | bf16 | fp16 (autocast) | fp64; docs/distributed.md
_C.TRAIN.PRECISION = "fp32"
# on: deterministic algorithms, so that a resumed run equals a straight one to the bit on a GPU as well | off: the
# fastest algorithms, as cuDNN times them
_C.TRAIN.DETERMINISTIC = "on"
_C.TRAIN.MICRO_BATCH = (
    0  # images a rank takes at a time, whole batch norm groups: less memory, the same numbers; 0: all
)
_C.TRAIN.COMPILE = "off"  # network and losses under torch.compile: off | on; the first step takes minutes
_C.TRAIN.CUDA_GRAPH = "off"  # the step is captured once as a CUDA graph and replayed: off | on; for small batches
_C.TRAIN.FREEZE_STEPS = 0  # so many steps leave the backbone, its running statistics included, as it is
_C.TRAIN.EMA = 0.0  # decay of a moving average of the weights, evaluated beside them, such as 0.999; 0: none
_C.TRAIN.LOG_STEP = 10  # steps between log lines
_C.TRAIN.CHECKPOINT_EPOCH = 1  # epochs between checkpoints; 0: none at epoch ends
_C.TRAIN.CHECKPOINT_STEP = 0  # steps between checkpoints; 0: none in mid-epoch; both 0: nothing is saved at all
_C.TRAIN.KEEP_CHECKPOINTS = 2  # the newest so many are kept, and the best
_C.TRAIN.ON_NAN = "error"  # a step with a non-finite gradient is left out; error: the run ends at the next log line
_C.TRAIN.MAX_SKIPPED = 10  # ON_NAN skip: so many steps left out in a row are an error all the same
_C.TRAIN.ALLOW_CHANGES = False  # resume although keys that define the mathematics differ from the checkpoint's
_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adam"  # adam | adamw (decoupled weight decay) | sgd (momentum 0.9, Nesterov)
_C.TRAIN.OPTIMIZER.LR = 0.00035  # learning rate; it belongs to the global batch, whatever the number of ranks
_C.TRAIN.OPTIMIZER.WEIGHT_DECAY = 5e-4  # on every parameter, batch norm and biases included
_C.TRAIN.OPTIMIZER.BACKBONE_FACTOR = 1.0  # the backbone's learning rate over that of what is new behind it
_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "step"  # of the learning rate: step | cosine
_C.TRAIN.LR_SCHEDULER.STEPSIZE = [20, 40]  # step: epochs after which the rate is multiplied
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: by this
_C.TRAIN.LR_SCHEDULER.FLAT_EPOCHS = 0  # cosine: epochs at the full rate before it falls
_C.TRAIN.LR_SCHEDULER.END_EPOCH = 0  # cosine: the epoch at whose end END_LR is reached; 0: MAX_EPOCH
_C.TRAIN.LR_SCHEDULER.END_LR = 0.0  # cosine: the rate it falls to
_C.TRAIN.LR_SCHEDULER.WARMUP_STEPS = 0  # steps over which the rate rises linearly to the schedule's
_C.TRAIN.LR_SCHEDULER.WARMUP_FACTOR = 0.1  # the part of it that the warm-up begins at

_C.TEST = CfgNode()
_C.TEST.DISTANCE = "cosine"  # cosine | euclidean; also the triplet loss's distance
_C.TEST.DATASETS = []  # data sets to evaluate on, a row each; the best checkpoint is chosen on the first; []: DATASET
_C.TEST.EVAL_STEP = 5  # epochs between evaluations; <= 0: at the end only
_C.TEST.START_EVAL = 0  # no evaluation up to this epoch
_C.TEST.PRECISION = ""  # of the network's arithmetic at test: fp32 | tf32 | bf16 | fp16 | '': TRAIN.PRECISION
_C.TEST.FEATURE_DTYPE = ""  # what test features are kept in: fp16 | bf16 (half the memory) | '': as they are computed
# The rest of TEST is for evaluation as a command (evaluate, train --eval), each a row of the table or a block of
# evaluation.json; docs/evaluation.md
_C.TEST.DETAILS = True  # ROC, mAP by camera pair, worst identities, queries of one identity and camera pooled
_C.TEST.RERANK = False  # k-reciprocal re-ranking
_C.TEST.RERANK_K1 = 20  # neighbours tried for reciprocity
_C.TEST.RERANK_K2 = 6  # neighbours whose encodings are averaged
_C.TEST.RERANK_LAMBDA = 0.3  # the original distance's share, 0 to 1
_C.TEST.EXPAND = "off"  # alpha query expansion: off | query | both (query and gallery)
_C.TEST.EXPAND_K = 10  # neighbours added to a feature
_C.TEST.EXPAND_ALPHA = 3.0  # power of their cosines, which weigh them
# Evaluations with one gallery image of each identity, drawn anew (SEED); 0: none, but 100 for CUHK03's classic splits
_C.TEST.SINGLE_SHOT = 0
_C.TEST.BEST_METRIC = "rank1"  # rank1 (as the original) | mAP: what best.pt is the best by; mAP decides among equals

_C.REPORT = CfgNode()
_C.REPORT.PAGE = True  # after each evaluation report/index.html is built, by a process beside the training
_C.REPORT.ACTIVATION_MAPS = False  # the page shows where the network responds in the worst queries

_C.WANDB = CfgNode()
_C.WANDB.MODE = "disabled"  # metrics to wandb: disabled | offline (files to send later) | online
_C.WANDB.PROJECT = "reid_dist"  # the project that wandb files the run under
_C.WANDB.PICTURES = False  # after each evaluation a table of ranked lists with their images
_C.WANDB.ARTIFACT = False  # at the end best.pt is uploaded as a model artifact

_C.TENSORBOARD = False  # the same numbers for TensorBoard, in the run's folder

_C.DIST = CfgNode()
_C.DIST.START_TIMEOUT_S = 1800.0  # seconds that a rank waits for the others, until the first step is done
_C.DIST.TIMEOUT_S = 300.0  # the same from then on; a rank that is stuck for half of it says where it stands

_C.SEED = 0  # of the epoch plan and of the initial weights
_C.EVAL_MODE = False  # like --eval: evaluate only
_C.GPU = "0"  # no meaning here: CUDA_VISIBLE_DEVICES and --nproc_per_node decide
_C.OUTPUT = ""  # a run is written to OUTPUT/DATASET/TAG; '' is ./runs
_C.TAG = "res50-ce-tri"  # name of the run, the last part of its folder

# Keys that may change when a run is resumed, because they enter neither a training step nor what best.pt is chosen by.
FREE_ON_RESUME = {
    "DATA.ROOT", "DATA.NUM_WORKERS", "DATA.TEST_BATCH", "DATA.CACHE", "DATA.CACHE_GB",
    "DATA.CACHE_DEVICE_GB",
    "MODEL.RESUME", "MODEL.PRETRAINED", "MODEL.CLASSIFIER_SHARDED",
    "TRAIN.MAX_EPOCH", "TRAIN.MAX_STEPS", "TRAIN.MICRO_BATCH", "TRAIN.LOG_STEP", "TRAIN.CHECKPOINT_EPOCH",
    "TRAIN.CHECKPOINT_STEP", "TRAIN.KEEP_CHECKPOINTS", "TRAIN.MAX_SKIPPED", "TRAIN.ON_NAN", "TRAIN.ALLOW_CHANGES",
    "DIST.START_TIMEOUT_S", "DIST.TIMEOUT_S", "TEST.EVAL_STEP", "TEST.START_EVAL", "WANDB.MODE", "WANDB.PROJECT",
    "WANDB.PICTURES", "WANDB.ARTIFACT", "TENSORBOARD", "REPORT.PAGE", "REPORT.ACTIVATION_MAPS",
    "TEST.DETAILS", "TEST.RERANK", "TEST.RERANK_K1", "TEST.RERANK_K2", "TEST.RERANK_LAMBDA",
    "TEST.EXPAND", "TEST.EXPAND_K", "TEST.EXPAND_ALPHA", "TEST.SINGLE_SHOT",
    "EVAL_MODE", "GPU", "OUTPUT", "TAG",
}  # fmt: skip

CHOICES: dict[str, tuple[Any, ...]] = {
    "DATA.SAMPLER": ("chunk", "identity", "identity_camera"),
    "DATA.ON_BAD_IMAGE": ("error", "skip"),
    "DATA.PIPELINE": ("auto", "dali", "torch"),
    "DATA.DECODE_DEVICE": ("auto", "cpu", "gpu"),
    "DATA.CACHE": ("off", "encoded", "resized", "device"),
    "MODEL.RES4_STRIDE": (1, 2),
    "MODEL.IANET.VARIANT": ("released", "normalised"),
    "MODEL.HEAD": ("simple", "bnneck"),
    "MODEL.POOL": ("avg", "gem", "max+avg"),
    "TRAIN.COMPILE": ("off", "on"),
    "TRAIN.CUDA_GRAPH": ("off", "on"),
    "TRAIN.PRECISION": ("fp32", "tf32", "bf16", "fp16", "fp64"),
    "TRAIN.DETERMINISTIC": ("on", "off"),
    "TRAIN.OPTIMIZER.NAME": ("adam", "adamw", "sgd"),
    "TRAIN.LR_SCHEDULER.NAME": ("step", "cosine"),
    "TRAIN.ON_NAN": ("error", "skip"),
    "TEST.BEST_METRIC": ("rank1", "mAP"),
    "TEST.DISTANCE": ("cosine", "euclidean"),
    "TEST.PRECISION": ("", "fp32", "tf32", "bf16", "fp16"),
    "TEST.FEATURE_DTYPE": ("", "fp16", "bf16"),
    "TEST.EXPAND": ("off", "query", "both"),
    "LOSS.PAIR_DISTANCE": ("", "cosine", "euclidean"),
    "WANDB.MODE": ("disabled", "offline", "online"),
}
AT_LEAST: dict[str, float] = {
    "DATA.VAL_IDS": 0,
    "DATA.NUM_WORKERS": 0, "DATA.HEIGHT": 8, "DATA.WIDTH": 8, "DATA.TRAIN_BATCH": 1, "DATA.TEST_BATCH": 1,
    "DATA.NUM_INSTANCES": 1, "DATA.CACHE_GB": 0.0, "DATA.CACHE_DEVICE_GB": 0.0,
    "MODEL.FEATURE_DIM": 1, "MODEL.EMBED_DIM": 0, "MODEL.BN_GROUP": 0,
    "TRAIN.START_EPOCH": 0,
    "TRAIN.MAX_EPOCH": 1, "TRAIN.MAX_STEPS": 0, "TRAIN.MICRO_BATCH": 0, "TRAIN.LOG_STEP": 1,
    "TRAIN.KEEP_CHECKPOINTS": 1, "TRAIN.MAX_SKIPPED": 1, "DIST.START_TIMEOUT_S": 1.0, "DIST.TIMEOUT_S": 1.0,
    "TRAIN.CHECKPOINT_EPOCH": 0, "TRAIN.CHECKPOINT_STEP": 0, "TRAIN.OPTIMIZER.LR": 0.0,
    "TRAIN.OPTIMIZER.WEIGHT_DECAY": 0.0, "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.0, "LOSS.CENTER": 0.0,
    "LOSS.CENTER_LR": 0.0, "TRAIN.FREEZE_STEPS": 0, "TRAIN.EMA": 0.0, "TRAIN.OPTIMIZER.BACKBONE_FACTOR": 0.0,
    "TRAIN.LR_SCHEDULER.FLAT_EPOCHS": 0, "TRAIN.LR_SCHEDULER.END_EPOCH": 0, "TRAIN.LR_SCHEDULER.END_LR": 0.0,
    "TRAIN.LR_SCHEDULER.WARMUP_STEPS": 0, "TRAIN.LR_SCHEDULER.WARMUP_FACTOR": 0.0, "SEED": 0,
    "TEST.RERANK_K1": 1, "TEST.RERANK_K2": 1, "TEST.RERANK_LAMBDA": 0.0, "TEST.EXPAND_K": 1, "TEST.EXPAND_ALPHA": 0.0,
    "TEST.SINGLE_SHOT": 0,
}  # fmt: skip
