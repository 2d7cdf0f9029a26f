// The page's texts in the visitor's language, as the server put them into the page.

const source = document.getElementById("ask").dataset.texts;

export const texts = JSON.parse(source);

const numbers = new Intl.NumberFormat(document.documentElement.lang);
const short = new Intl.NumberFormat(document.documentElement.lang, { maximumFractionDigits: 1 });

/** `text` with each {name} replaced by its value. */
export function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export const whole = (number) => numbers.format(number);
export const decimal = (number) => short.format(number);
