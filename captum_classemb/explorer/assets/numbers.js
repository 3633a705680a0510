// Numbers as people read them, with a real minus sign.

const RAISED = Object.fromEntries([..."-0123456789"].map((sign, i) => [sign, "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"[i]]));

export function rounded(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e-3 && size < 1e5 ? d3.format(`.${digits}~r`)(size) : power(size, digits);
  return (value < 0 ? "−" : "") + text;
}

function power(size, digits) {
  const [mantissa, exponent] = size.toExponential(digits - 1).split("e");
  const raised = exponent.replace("+", "").replace(/./g, (sign) => RAISED[sign]);
  return `${mantissa}·10${raised}`;
}

// To two digits, never less than the bound that it stands for.
export function bound(value) {
  const unit = 10 ** (Math.floor(Math.log10(value || 1)) - 1);
  return rounded(Math.ceil(value / unit) * unit, 2);
}

export function signed(value, digits = 3) {
  return (value > 0 ? "+" : "") + rounded(value, digits);
}

// To a given number of decimals, so that terms of a sum line up with it.
export function fixed(value, decimals = 2) {
  const text = Math.abs(value).toFixed(decimals);
  return (value < 0 && Number(text) !== 0 ? "−" : "+") + text;
}

export function percent(share) {
  if (share >= 0.9995) return "100 %";
  return share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}
