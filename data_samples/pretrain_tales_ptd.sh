#!/bin/bash
# A launch script in the shape of ModelLink's: a small model learns the sample tales. Read it with
#   ascend_nb import-script data_samples/pretrain_tales_ptd.sh > run.yaml
source /usr/local/Ascend/ascend-toolkit/set_env.sh
export CUDA_DEVICE_MAX_CONNECTIONS=1
export HCCL_CONNECT_TIMEOUT=1200

NPUS_PER_NODE=2
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=localhost
MASTER_PORT=6000
WORLD_SIZE=$((NPUS_PER_NODE * $NNODES))

SAMPLES="data_samples"
TOKENIZER_PATH="${SAMPLES}/tokenizer"
DATA_PATH="$SAMPLES/tales.jsonl"
CKPT_SAVE_DIR="runs/tales"

TP=2
MBS=2
ACCUMULATION=2
GBS=$((MBS * ACCUMULATION * WORLD_SIZE / TP))
STEPS=12

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

MODEL_ARGS=(
    --use-mcore-models
    --num-layers 2
    --hidden-size 64
    --ffn-hidden-size 160
    --num-attention-heads 4
    --group-query-attention
    --num-query-groups 2
    --max-position-embeddings 128   # as long as a sample
    --position-embedding-type rope
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --init-method-std 0.02
)

GPT_ARGS="
    --tensor-model-parallel-size ${TP} \
    --sequence-parallel \
    --use-distributed-optimizer \
    --use-flash-attn \
    --use-fused-rmsnorm \
    --seq-length 128 \
    --micro-batch-size ${MBS} \
    --global-batch-size ${GBS} \
    --train-iters ${STEPS} \
    --lr 1e-3 \
    --min-lr 1e-4 \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.1 \
    --weight-decay 0.1 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --no-gradient-accumulation-fusion \
    --seed 42
"

DATA_ARGS="
    --data-path $DATA_PATH \
    --split 100,0,0 \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path ${TOKENIZER_PATH}
"

OUTPUT_ARGS="
    --log-interval 1 \
    --save-interval 6 \
    --eval-interval 12 \
    --eval-iters 0
"

torchrun $DISTRIBUTED_ARGS pretrain_gpt.py \
    "${MODEL_ARGS[@]}" \
    $GPT_ARGS \
    $DATA_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    --save $CKPT_SAVE_DIR \
    2>&1 | tee logs/pretrain_tales.log
