//! A target as an ordinary program: runs the inputs that it is given as files.

use std::ffi::OsString;
use std::fmt::Debug;
use std::process::ExitCode;

/// Runs the files named on the command line one after the other. A failed check ends the program, whichever thread
/// meets it.
pub fn main<T: Debug>(run: fn(&[u8]) -> T) -> ExitCode {
    let files: Vec<OsString> = std::env::args_os().skip(1).collect();
    if files.is_empty() {
        eprintln!("usage: name the files to replay; to fuzz, run cargo xtask fuzz");
        return ExitCode::FAILURE;
    }
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::exit(101);
    }));
    for file in files {
        let bytes = match std::fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) => {
                eprintln!("{}: {error}", file.display());
                return ExitCode::FAILURE;
            }
        };
        println!("{}: {:?}", file.display(), run(&bytes));
    }
    ExitCode::SUCCESS
}
