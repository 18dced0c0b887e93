"""What other tools, and older versions of mlx-lm, call our settings: for the suggestions in error messages."""

# Names of a setting -> its name here. Compared in lower case, with underscores.
SYNONYMS = {
    name: ours
    for ours, names in {
        "model": "base_model model_name model_name_or_path model_path model_id checkpoint_dir hf_path",
        "data": "dataset datasets dataset_name dataset_path data_dir data_path train_file train_data",
        "adapter_path": "adapter adapter_file adapter_dir output output_dir out_dir save_dir save_path",
        "num_layers": "lora_layers num_lora_layers n_layers layers",
        "rank": "r lora_r lora_rank lora_dim",
        "dropout": "lora_dropout",
        "keys": "target_modules lora_target lora_target_modules lora_modules lora_keys",
        "scale": "lora_scale",
        "learning_rate": "lr max_lr peak_lr",
        "batch_size": "batch bs per_device_train_batch_size micro_batch_size mini_batch_size train_batch_size",
        "iters": "iterations steps num_steps max_steps max_iters num_iters total_steps train_steps",
        "epochs": "epoch num_epochs num_train_epochs max_epochs",
        "grad_accumulation_steps": "gradient_accumulation gradient_accumulation_steps grad_accum "
        "grad_accum_steps grad_accumulation accumulate_grad_batches accumulation_steps",
        "grad_checkpoint": "gradient_checkpointing gradient_checkpoint grad_checkpointing checkpoint_activations",
        "grad_clip": "max_grad_norm max_norm gradient_clip_val gradient_clipping clip_grad clip_grad_norm",
        "max_seq_length": "max_seq_len max_length max_len sequence_len sequence_length seq_length cutoff_len "
        "block_size context_length",
        "steps_per_eval": "eval_steps eval_every eval_interval val_every",
        "steps_per_report": "logging_steps log_every log_interval report_every",
        "save_every": "save_steps steps_per_save save_interval checkpoint_every",
        "val_batches": "eval_batches eval_iters max_eval_batches",
        "keep_last": "save_total_limit keep_checkpoints",
        "early_stopping": "early_stopping_patience patience",
        "resume": "resume_from_checkpoint resume_from auto_resume_from_checkpoints",
        "resume_adapter_file": "init_adapter lora_weights lora_model_dir",
        "fine_tune_type": "finetuning_type train_type tuning_type method peft_type use_dora",
        "optimizer": "optim optimizer_name",
        "optimizer_config": "optimizer_args optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon",
        "lr_schedule": "lr_scheduler lr_scheduler_type scheduler warmup warmup_steps warmup_ratio num_warmup_steps "
        "lr_warmup_steps min_lr",
        "quantize": "load_in_4bit load_in_8bit q_bits bits quantization_bit",
        "packing": "sample_packing pack_sequences use_packing",
        "mask_prompt": "mask_inputs train_on_completions completion_only_loss assistant_only_loss "
        "train_on_responses_only",
        "report_to": "logger wandb use_wandb",
        "project_name": "wandb_project project",
        "seed": "random_seed random_state prng_seed",
        "trust_remote_code": "remote_code",
        "max_tokens": "max_new_tokens max_gen_tokens n_predict num_predict",
        "temp": "temperature",
        "system_prompt": "system",
    }.items()
    for name in names.split()
}

# What else to know when a name of another tool stands where ours belongs.
ADVICE = {
    "alpha": "set scale to alpha / rank",
    "lora_alpha": "set scale to alpha / rank",
    "max_steps": "iters counts batches, not optimizer updates",
}
# Settings that only a config file takes -> how they are written there.
FILE_ONLY = {
    "lr_schedule": "lr_schedule: {name: cosine_decay, warmup: UPDATES, arguments: [RATE, UPDATES]}",
    "optimizer_config": "optimizer_config: {adamw: {weight_decay: 0.01}}",
}
