//! Tables of a page.

/// A table whose source has straight columns, so that changes are easy to see.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(|title| title.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell_text(cell).chars().count());
        }
    }
    let line = |cells: [String; N]| {
        let mut line = String::from("|");
        for (cell, width) in cells.iter().zip(widths) {
            line += &format!(" {cell:width$} |");
        }
        line + "\n"
    };
    let mut text = line(head.map(str::to_owned)) + &line(widths.map(|width| "-".repeat(width)));
    for row in rows {
        text += &line(row.clone().map(|cell| cell_text(&cell)));
    }
    text
}

/// A cell's text; a bar would end the cell.
fn cell_text(cell: &str) -> String {
    cell.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_straight_and_bars_do_not_end_cells() {
        let rows = [["a | b".to_owned(), "1".to_owned()]];
        assert_eq!(
            table(["what", "n"], &rows),
            "| what   | n |\n| ------ | - |\n| a \\| b | 1 |\n"
        );
    }
}
