"""A tokenizer of 128 x 128 pictures, 256 codes of 2,048, on two CPU cores: squares of 8 pixels, convolutions between.

Command:   moma codec train configs/codec/corpus_f8.py
Data:      the folder named by MOMA_CORPUS (default ../shared/data; any folder of pictures, or of Parquet with pairs).
Hardware:  2 CPU cores.
Time:      45 minutes measured on a machine shared with other work; 61 processor minutes.
Quality:   held out PSNR 23.61 dB, SSIM 0.790, 99.5% of the codes occur; a palette of as many codes has 18.02 dB. See
           docs/results/corpus_f8.md.
"""

import os

from moma_jax.codec.network import VqganConfig
from moma_jax.config import OptimizerConfig
from moma_jax.training.codec.config import CodecConfig, CodecTrainConfig, LossConfig, PicturesConfig


def config() -> CodecConfig:
    """The recipe."""
    return CodecConfig(
        network=VqganConfig(
            side=128,
            patch=8,  # 16 x 16 places from the first layer on
            channels=96,
            multipliers=(1,),
            blocks=0,  # two in the middle, and one more of the decoder
            middle_attention=False,
            latent=96,
            codebook=2048,
            code_width=16,
        ),
        data=PicturesConfig(source=os.environ.get("MOMA_CORPUS", "../shared/data")),
        # The mean squared error is what PSNR is made of; a critic would cost as much again, and lower it.
        loss=LossConfig(reconstruction="squared", codebook="average", average_decay=0.98),
        optimizer=OptimizerConfig(
            peak_lr=2e-3, end_lr=2e-5, schedule="cosine", warmup_steps=100, beta2=0.99, epsilon=1e-8, weight_decay=0.0
        ),
        train=CodecTrainConfig(
            steps=5000,
            batch=8,
            log_every=50,
            eval_every=1000,
            eval_pictures=401,
            sheet_pictures=32,
            checkpoint_every=250,
        ),
    )
