//! One program for all fuzz targets: libFuzzer around the one that `MESH_FUZZ_TARGET` names.
//! `cargo xtask fuzz` builds and runs it; targets are where the parsers are, under `cfg(fuzzing)`.
//!
//! libFuzzer's arguments are its own; `MESH_FUZZ_SEEDS` names a directory to write seeds to,
//! `MESH_FUZZ_TARGET=list` prints what there is.

#![cfg_attr(fuzzing, no_main)]

#[cfg(all(fuzzing, feature = "engine"))]
mod engine {
    use std::{fs, path::Path, sync::LazyLock};

    use crate::targets::{TARGETS, Target};

    static TARGET: LazyLock<&Target> = LazyLock::new(|| {
        let name = std::env::var("MESH_FUZZ_TARGET").unwrap_or_default();
        TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| {
            TARGETS.iter().for_each(|target| println!("{}", target.name));
            std::process::exit(if name == "list" { 0 } else { 2 })
        })
    });

    libfuzzer_sys::fuzz_target!(
        init: {
            LazyLock::force(&TARGET);
            if let Some(directory) = std::env::var_os("MESH_FUZZ_SEEDS") {
                for (n, seed) in (TARGET.seeds)().into_iter().enumerate() {
                    let path = Path::new(&directory).join(format!("seed-{n}"));
                    fs::write(path, seed).expect("the seeds' directory can be written");
                }
            }
        },
        |data: &[u8]| (TARGET.run)(data)
    );
}

#[cfg(fuzzing)]
mod targets;

#[cfg(not(fuzzing))]
fn main() {
    eprintln!("mesh-fuzz was built without its targets: run `cargo xtask fuzz`");
    std::process::exit(2);
}
