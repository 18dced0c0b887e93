"""What other tools, and older versions of mlx-lm, call our settings and values: for suggestions in error messages."""

# Settings and flags -> their names elsewhere, in lower case and with underscores. A name may stand for several: the
# first one that a command has is suggested.
_RESULTS = (
    "o out out_dir out_path output output_dir output_path save save_dir save_path save_to dest destination"
)
_NAMES = {
    "model": "base_model base m model_name model_name_or_path model_path model_id model_dir checkpoint_dir hf_path "
    "hf_model pretrained_model_name_or_path",
    "data": "dataset datasets dataset_name dataset_path dataset_dir data_dir data_path data_file data_files d input "
    "input_file train_file train_data train_dataset training_data",
    # Where a command writes. Only training writes to adapter_path, see `did_you_mean`.
    "output": f"{_RESULTS} out_file outfile output_file",
    "save_path": f"{_RESULTS} mlx_path",
    "adapter_path": f"{_RESULTS} adapter adapters adapter_dir adapter_file adapter_name adapter_name_or_path lora "
    "lora_path lora_dir peft_path checkpoint run run_dir log_dir logging_dir",
    "num_layers": "lora_layers num_lora_layers n_layers layers",
    "rank": "r lora_r lora_rank lora_dim",
    "dropout": "lora_dropout",
    "keys": "target_modules targets lora_target lora_target_modules lora_modules lora_keys modules",
    "scale": "lora_scale",
    "learning_rate": "lr max_lr peak_lr",
    "batch_size": "b batch bs per_device_train_batch_size per_device_batch_size micro_batch_size mini_batch_size "
    "train_batch_size",
    "iters": "iterations steps num_steps max_steps max_iters num_iters total_steps train_steps num_training_steps",
    "epochs": "epoch num_epochs num_train_epochs max_epochs",
    "grad_accumulation_steps": "gradient_accumulation gradient_accumulation_steps grad_accum grad_accum_steps "
    "grad_accumulation accumulate_grad_batches accumulation_steps",
    "grad_checkpoint": "gradient_checkpointing gradient_checkpoint grad_checkpointing checkpoint_activations "
    "use_gradient_checkpointing activation_checkpointing",
    "grad_clip": "max_grad_norm max_norm gradient_clip gradient_clip_val gradient_clipping clip clip_grad "
    "clip_grad_norm",
    "max_seq_length": "max_seq_len max_length max_len sequence_len sequence_length seq_length seq_len cutoff_len "
    "block_size context_length model_max_length",
    "steps_per_eval": "eval_steps eval_every eval_interval val_every val_interval validate_every",
    "steps_per_report": "logging_steps log_every log_interval log_steps report_every",
    "save_every": "save_steps steps_per_save save_interval checkpoint_every",
    "val_batches": "eval_batches eval_iters max_eval_batches",
    "valid_fraction": "val_split valid_split validation_split val_set_size val_size eval_size test_size val_fraction "
    "validation_fraction",
    "keep_last": "save_total_limit keep_checkpoints",
    "early_stopping": "early_stopping_patience patience",
    "resume": "resume_from_checkpoint resume_from auto_resume_from_checkpoints continue",
    "resume_adapter_file": "init_adapter init_from lora_weights lora_model_dir pretrained_lora",
    "fine_tune_type": "finetune_type finetuning_type train_type tuning_type method mode peft peft_type use_dora dora "
    "qlora use_qlora full_finetuning",
    "optimizer": "optim optimizer_name",
    "optimizer_config": "optimizer_args optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon",
    "lr_schedule": "lr_scheduler lr_scheduler_type scheduler warmup warmup_steps warmup_ratio num_warmup_steps "
    "lr_warmup_steps min_lr",
    "quantize": "load_in_4bit load_in_8bit q_bits bits quantization quantization_bit qlora_bits",
    "bits": "q_bits quantize quantization",
    "type": "quant quant_type quantize quantization qtype ftype outtype q_bits bits dtype",
    "dequantize": "de_quantize",
    "packing": "sample_packing pack pack_sequences use_packing",
    "mask_prompt": "mask_inputs mask_prompts train_on_completions completion_only_loss completions_only "
    "assistant_only_loss train_on_responses_only train_on_inputs",
    "show_masks": "print_masks show_mask preview",
    "plan": "dry_run estimate_memory",
    "prompt_feature": "prompt_key prompt_field prompt_column input_key question_key instruction_key",
    "completion_feature": "completion_key completion_field completion_column response_key output_key answer_key",
    "text_feature": "text_key text_field text_column dataset_text_field",
    "chat_feature": "chat_key messages_key messages_field messages_column conversations_key",
    "hf_dataset": "hf_datasets dataset_config",
    "report_to": "logger wandb use_wandb tensorboard",
    "project_name": "wandb_project project",
    "push_to_hub": "hub_model_id repo repo_id hf_repo upload upload_repo push_to_hub_model_id",
    "upload_repo": "hub_model_id repo repo_id hf_repo upload",
    "seed": "random_seed random_state prng_seed",
    "trust_remote_code": "remote_code",
    "prompt": "message question query instruction user_prompt input",
    "system_prompt": "system system_message",
    "max_tokens": "max_new_tokens max_gen_tokens max_length max_len max_output_tokens max_completion_tokens num_tokens "
    "n_predict num_predict",
    "max_kv_size": "context_length ctx_size n_ctx num_ctx",
    "temp": "temperature t",
    "compare": "side_by_side",
    "host": "address bind ip",
    "chat_template_args": "chat_template_kwargs",
    "weight": "weights adapter_weight adapter_weights",
}
SYNONYMS: dict[str, list[str]] = {}
for _ours, _theirs in _NAMES.items():
    for _name in _theirs.split():
        SYNONYMS.setdefault(_name, []).append(_ours)

# Names for the place of a command's result.
RESULTS = frozenset(_RESULTS.split())

# What else to know when a name of another tool stands where ours belongs.
ADVICE = {
    "alpha": "set scale to alpha / rank",
    "lora_alpha": "set scale to alpha / rank",
    "max_steps": "iters counts batches, not optimizer updates",
    "qlora": "QLoRA is a quantized base model: quantize 4, or a model in 4 bits",
    "use_qlora": "QLoRA is a quantized base model: quantize 4, or a model in 4 bits",
    "train_on_inputs": "it means the opposite",
}
# Settings that only a config file takes -> how they are written there.
FILE_ONLY = {
    "lr_schedule": "lr_schedule: {name: cosine_decay, warmup: UPDATES, arguments: [RATE, UPDATES]}",
    "optimizer_config": "optimizer_config: {adamw: {weight_decay: 0.01}}",
    "hf_dataset": "hf_dataset: {path: OWNER/NAME, prompt_feature: KEY, completion_feature: KEY}",
    "lora_parameters": "lora_parameters: {rank: 8, scale: 20.0}",
    "na_parameters": "na_parameters: {mask: soft}",
}

# Settings -> their values -> what other tools call these.
VALUES = {
    name: {theirs: ours for ours, others in values.items() for theirs in others.split()}
    for name, values in {
        "optimizer": {
            "adamw": "adamw_torch adamw_torch_fused adamw_hf adamw_8bit adamw8bit adamw_bnb_8bit paged_adamw "
            "paged_adamw_8bit paged_adamw_32bit adamw_anyprecision",
            "adam": "adam8bit adam_8bit",
            "sgd": "momentum",
        },
        "fine_tune_type": {
            "na-lora": "nalora na_lora qlora q-lora peft",
            "dora": "qdora",
            "full": "fft full-finetune full_finetune full-finetuning sft",
        },
        "type": {
            "f32": "fp32 float32",
            "f16": "fp16 float16 half",
            "bf16": "bfloat16",
            "q8_0": "q8 int8 8bit 8 q8_k",
            "q4_k_m": "q4 int4 4bit 4 q4_k q4_k_s q4_k_l iq4_xs iq4_nl q3_k_m q3_k_l",
            "q5_k_m": "q5 5bit 5 q5_k q5_k_s q5_k_l",
            "q6_k": "q6 6bit 6 q6_k_l",
        },
    }.items()
}
# What else to set when a value of another tool stands where ours belongs.
VALUE_ADVICE = {value: "with quantize 4" for value in ("qlora", "q-lora", "qdora")}

# Commands -> what people call them.
COMMANDS = {
    theirs: [ours]
    for ours, others in {
        "lora": "train finetune fine-tune tune fit sft test resume",
        "fuse": "merge",
        "export": "convert gguf quantize save peft ollama lmstudio push upload",
        "generate": "run ask answer infer inference predict prompt complete",
        "chat": "compare talk repl",
        "serve": "server api openai",
        "evaluate": "eval benchmark score metrics lm_eval lm-eval harness",
        "report": "plot plots dashboard html card",
        "doctor": "check info plan diagnose env validate",
        "completion": "completions autocomplete",
    }.items()
    for theirs in others.split()
}
