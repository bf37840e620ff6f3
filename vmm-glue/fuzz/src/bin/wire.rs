//! The target [`numagpu_vmm_glue_fuzz::wire`]: with `--cfg fuzzing` under libFuzzer, else on files.

#![cfg_attr(fuzzing, no_main)]
#![cfg_attr(
    fuzzing,
    allow(unsafe_code, reason = "libFuzzer calls functions by name")
)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    numagpu_vmm_glue_fuzz::wire::run(bytes);
});

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    numagpu_devices_fuzz::replay::main(numagpu_vmm_glue_fuzz::wire::run)
}
